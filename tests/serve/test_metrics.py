"""What /metrics and /cluster say after known generations."""

import json
from contextlib import closing
from http.client import HTTPConnection

import httpx2
import pytest
from fake_ranks import FakeRanks
from front import serving, until
from prometheus_client.parser import text_string_to_metric_families

pytestmark = pytest.mark.once


def samples(front):
    """All samples: {name and its labels but the model's: value}."""
    text = httpx2.get(f"{front.url}/metrics").text
    values = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k != "model_name"}
            assert sample.labels["model_name"] == "small"
            values[(sample.name.removeprefix("mlxtp:"), *sorted(labels.values()))] = (
                sample.value
            )
    return values


def asking(front, body):
    """A connection that has asked; whoever closes it hangs up."""
    connection = HTTPConnection(front.url.removeprefix("http://"), timeout=20)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    return closing(connection)


def test_metrics():
    """Each value follows from what was asked; nothing is counted twice."""
    with serving(FakeRanks(step_seconds=0.02, running=1)) as front:
        until(lambda: front.ranks.stats is not None)
        zero = samples(front)
        assert zero["prompt_tokens_total",] == 0
        assert zero["request_success_total", "stop"] == 0
        assert zero["time_to_first_token_seconds_count",] == 0

        def complete(prompt, **more):
            body = {"model": "small", "prompt": prompt, "max_tokens": 50, **more}
            return front.post("/v1/completions", body)

        assert complete("four").status_code == 200  # 4 tokens, and the one at the end
        one = samples(front)
        parts = ("time_to_first_token_seconds_sum", "inter_token_latency_seconds_sum")
        whole = one["e2e_request_latency_seconds_sum",]
        assert sum(one[part,] for part in parts) == pytest.approx(whole)
        assert complete("three", max_tokens=3).status_code == 200
        assert complete("mistake: no").status_code == 400
        assert complete("error: no").status_code == 503
        body = {"model": "small", "prompt": "xy\nhang:", "stream": True}
        with asking(front, body) as first:
            assert first.getresponse().readline().startswith(b"data:")
            with asking(front, body):  # one at a time: it waits
                until(lambda: len(front.ranks.generations) == 2)
                until(lambda: samples(front)["generation_tokens_total",] == 11)
                during = samples(front)
                described = httpx2.get(f"{front.url}/cluster").json()
        assert during["num_requests_running",] == during["num_requests_waiting",] == 1
        assert (described["running"], described["waiting"]) == (1, 1)
        assert described["tokens_per_second"] > 0
        until(lambda: not front.ranks.generations)
        after = samples(front)
        ended = {
            reason: after["request_success_total", reason]
            for reason in ("stop", "length", "tool_calls", "abort", "error")
        }
        assert ended == {
            "stop": 1,
            "length": 1,
            "tool_calls": 0,
            "abort": 2,
            "error": 2,
        }
        assert after["prompt_tokens_total",] == 4 + 5 + len("xy\nhang:")
        tokens = [5, 3, 3]
        assert after["generation_tokens_total",] == sum(tokens)
        assert after["time_to_first_token_seconds_count",] == 3
        assert after["time_to_first_token_seconds_bucket", "0.01"] == 0
        assert after["inter_token_latency_seconds_count",] == sum(tokens) - 3
        assert after["inter_token_latency_seconds_sum",] > 0.02 * (sum(tokens) - 3)
        assert after["request_queue_time_seconds_count",] == 5
        assert after["e2e_request_latency_seconds_count",] == 2
        assert after["e2e_request_latency_seconds_sum",] > 0.02 * 8
        assert after["num_requests_running",] == after["num_requests_waiting",] == 0

        # What the ranks say of themselves.
        stats = front.ranks.stats
        assert after["prefix_cache_queries_total",] == 100
        assert after["prefix_cache_hits_total",] == 50
        assert after["num_preemptions_total",] == 0
        assert after["spec_decode_num_drafts_total",] == 10
        assert after["spec_decode_num_draft_tokens_total",] == 40
        assert after["spec_decode_num_accepted_tokens_total",] == 30
        assert after["job_losses_total",] == after["hosts_missing",] == 0
        assert "kv_cache_usage_perc" in {name for name, *_ in after}
        of_rank = ("3", "studio3")
        assert after["rank_memory_bytes", *of_rank] == 10 << 30
        assert after["rank_peak_memory_bytes", *of_rank] == 12 << 30
        assert 0 < after["rank_sent_bytes_total", *of_rank] <= 1000 * stats.steps
        assert after["rank_collective_seconds_total", *of_rank] > 0


def test_cluster():
    """Each rank with its host, also before there is one."""
    with serving(FakeRanks(loading_seconds=0.3)) as front:
        loading = httpx2.get(f"{front.url}/cluster").json()
        assert loading["state"] in ("starting", "loading")
        assert loading["model"] is None and loading["ranks"] == []
        until(lambda: front.ranks.stats is not None)
        described = httpx2.get(f"{front.url}/cluster").json()
    assert described["state"] == "ready"
    assert described["model"] == "small"
    assert described["context"] == 4096
    assert described["links"] == "ring over TCP"
    assert described["hosts"][4] == {
        "host": "studio4",
        "chip": "Apple M3 Ultra",
        "ranks": [4],
    }
    rank = described["ranks"][4]
    assert (rank["host"], rank["share"]) == ("studio4", 0.2)
    assert (rank["used_bytes"], rank["memory_bytes"]) == (10 << 30, 256 << 30)
    assert rank["collective_share"] is None  # nothing has been computed
    assert described["tokens_per_second"] == 0
