"""GET /metrics: what the front sees of requests, and what the ranks say of themselves.

Names are vLLM's with `mlxtp:` for `vllm:`, so that its dashboards fit; the ranks' own
begin with `mlxtp:rank_`.
"""

import time
from collections.abc import Iterator

from fastapi import APIRouter, Request, Response
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    generate_latest,
)
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from mlxtp.serve.front.ranks import Generation, Ranks
from mlxtp.serve.messages import Event

# Upper ends of buckets, in seconds: vLLM's, for a first token, between tokens, and for
# a whole request.
FIRST_TOKEN_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5),
    *(5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKEN_SECONDS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5),
    *(5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_SECONDS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0),
    *(60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
# `Event.finish`, and what vLLM calls it.
FINISHED_REASONS = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "cancelled": "abort",
    "error": "error",
}
COMPLETE = ("stop", "length", "tool_calls")

router = APIRouter()


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Give all metrics as Prometheus reads them."""
    content = request.app.state.metrics.render()
    return Response(content, media_type=CONTENT_TYPE_LATEST)


class Metrics:
    """Counts what becomes of the requests of `ranks`, under the name of a model."""

    def __init__(self, ranks: Ranks, model_name: str) -> None:
        self._registry = CollectorRegistry()
        self._last_token: dict[str, float] = {}  # by request: when it came

        def counter(name: str, help: str, *labels: str) -> Counter:
            labels = ("model_name", *labels)
            return Counter(f"mlxtp:{name}", help, labels, registry=self._registry)

        def histogram(name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(
                f"mlxtp:{name}",
                help,
                ["model_name"],
                buckets=buckets,
                registry=self._registry,
            ).labels(model_name)

        self._prompt_tokens = counter(
            "prompt_tokens", "Tokens of prompts that were read."
        ).labels(model_name)
        self._generation_tokens = counter(
            "generation_tokens", "Tokens that were generated."
        ).labels(model_name)
        success = counter(
            "request_success", "Requests that have ended, by how.", "finished_reason"
        )
        self._ended = {
            finish: success.labels(model_name, reason)
            for finish, reason in FINISHED_REASONS.items()
        }
        self._first_token = histogram(
            "time_to_first_token_seconds",
            "From when the ranks get a request to its first token.",
            FIRST_TOKEN_SECONDS,
        )
        self._between_tokens = histogram(
            "inter_token_latency_seconds",
            "From one token of a request to its next.",
            TOKEN_SECONDS,
        )
        self._queue = histogram(
            "request_queue_time_seconds",
            "From when the ranks get a request to its admission.",
            REQUEST_SECONDS,
        )
        self._whole = histogram(
            "e2e_request_latency_seconds",
            "From when the ranks get a request to its end, if that is whole.",
            REQUEST_SECONDS,
        )
        self._registry.register(_OfRanks(ranks, model_name))
        ranks.observers.append(self._observe)

    def render(self) -> bytes:
        """Write all metrics as Prometheus reads them."""
        return generate_latest(self._registry)

    def _observe(self, generation: Generation, event: Event | None) -> None:
        if event is None:
            return
        now = time.monotonic()
        if event.admitted:
            self._queue.observe(now - generation.begun)
        if event.tokens and not event.is_told_again:
            self._note_tokens(generation, len(event.tokens), now)
        if event.finish is None:
            return
        self._ended[event.finish].inc()
        if event.finish in COMPLETE:
            self._whole.observe(now - generation.begun)
            if event.id not in self._last_token:  # it asked for no token
                self._prompt_tokens.inc(len(generation.start.prompt))
        self._last_token.pop(event.id, None)

    def _note_tokens(self, generation: Generation, count: int, now: float) -> None:
        self._generation_tokens.inc(count)
        last = self._last_token.get(generation.start.id)
        if last is None:
            self._prompt_tokens.inc(len(generation.start.prompt))
            self._first_token.observe(now - generation.begun)
        else:
            for _ in range(count):
                self._between_tokens.observe((now - last) / count)
        self._last_token[generation.start.id] = now


class _OfRanks(Collector):
    """What is known when somebody asks: requests now, `Stats`, and `Ready`'s ranks."""

    def __init__(self, ranks: Ranks, model_name: str) -> None:
        self._ranks = ranks
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        """Yield each metric with its values now."""
        running, waiting = self._ranks.running_and_waiting()
        yield self._gauge("num_requests_running", "Requests at work.", running)
        yield self._gauge("num_requests_waiting", "Requests in the queue.", waiting)
        yield self._counter(
            "job_losses",
            "Jobs that ended by themselves.",
            self._ranks.losses,
        )
        yield self._gauge(
            "hosts_missing", "Hosts that do not take part.", len(self._ranks.missing)
        )
        stats, ready = self._ranks.stats, self._ranks.ready
        if stats is None or ready is None:
            return
        yield self._gauge(
            "kv_cache_usage_perc",
            "The part of their limit that caches take, on the fullest rank, 0 to 1.",
            stats.cache_use,
        )
        yield self._counter(
            "prefix_cache_queries",
            "Tokens of prompts that were looked up in the prefix cache.",
            stats.prefix_queries,
        )
        yield self._counter(
            "prefix_cache_hits",
            "Tokens of prompts that were in the prefix cache.",
            stats.prefix_hits,
        )
        yield self._counter(
            "num_preemptions",
            "Requests that were set back because memory got short.",
            stats.preemptions,
        )
        yield self._counter(
            "spec_decode_num_drafts", "Drafts of requests.", stats.drafts
        )
        yield self._counter(
            "spec_decode_num_draft_tokens", "Tokens that were drafted.", stats.drafted
        )
        yield self._counter(
            "spec_decode_num_accepted_tokens",
            "Drafted tokens that the model has accepted.",
            stats.accepted,
        )
        hosts = {rank.rank: rank.host for rank in ready.ranks}
        labels = ["model_name", "rank", "host"]
        seconds = CounterMetricFamily(
            "mlxtp:rank_collective_seconds", "Seconds in collectives.", labels=labels
        )
        sent = CounterMetricFamily(
            "mlxtp:rank_sent_bytes", "Bytes sent to other ranks.", labels=labels
        )
        memory = GaugeMetricFamily(
            "mlxtp:rank_memory_bytes", "Bytes in use now.", labels=labels
        )
        peak = GaugeMetricFamily(
            "mlxtp:rank_peak_memory_bytes", "The most bytes in use.", labels=labels
        )
        for rank in stats.ranks:
            values = [self._model_name, str(rank.rank), hosts[rank.rank]]
            seconds.add_metric(values, rank.collective_seconds)
            sent.add_metric(values, rank.sent_bytes)
            memory.add_metric(values, rank.memory_bytes)
            peak.add_metric(values, rank.peak_memory_bytes)
        yield from (seconds, sent, memory, peak)

    def _gauge(self, name: str, help: str, value: float) -> Metric:
        metric = GaugeMetricFamily(f"mlxtp:{name}", help, labels=["model_name"])
        metric.add_metric([self._model_name], value)
        return metric

    def _counter(self, name: str, help: str, value: float) -> Metric:
        metric = CounterMetricFamily(f"mlxtp:{name}", help, labels=["model_name"])
        metric.add_metric([self._model_name], value)
        return metric
