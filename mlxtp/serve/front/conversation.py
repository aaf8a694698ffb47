"""A chat that is to be continued, whichever interface it came by, and how it begins.

`/v1/chat/completions`, `/v1/responses` and `/v1/messages` each make a `Conversation` of
their bodies; `begin` does the rest alike: it encodes, fills in what was left open,
checks the length, and hands the request to the ranks if there is room.
"""

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mlxtp.generation.settings import Settings
from mlxtp.serve.front.config import Config
from mlxtp.serve.front.errors import Refusal
from mlxtp.serve.front.journal import asked_now
from mlxtp.serve.front.ranks import Generation, Mistake, Ranks
from mlxtp.serve.messages import Ready, Start

# The tokens of all prompts of one request, each counted as often as it is answered.
MOST_PROMPT_TOKENS = 1 << 22
# Entries of logit_bias, counted alike: ranks read each answer's for itself.
MOST_BIASES = 1 << 16
# Log-probabilities of one request that the front keeps until the answer is whole.
MOST_LOGPROBS = 1 << 20


@dataclass(frozen=True)
class Conversation:
    """What a client wants continued.

    Args:
        messages: OpenAI's, each content one string: what `Text.chat` takes.
        tools: OpenAI's.
        tool_choice: "auto", "none", "required", or {"name": of the one tool}.
        parallel_tool_calls: several calls in one answer.
        grammar: what the answer must be, as `Settings.grammar`; None for anything.
        template_arguments: of the chat template, such as `enable_thinking`.
        effort: how much the model is to reason, in OpenAI's words; "none" is none.
        default_effort: the one that asks for no more than to leave it out, by the
            client's interface; None where that is not said.
        thinking: the model is to reason, if it can, or is not to; None leaves it open.
        settings: those that the client gave, in `Settings`' names.
        stop: texts that end the answer.
        continue_final: the answer goes on with the last message, an assistant's.
        is_cut: `max_tokens` that lead beyond the context are cut, not refused.
        is_streamed: log-probabilities are told as they come, and not kept.
        grammar_field, effort_field, logprobs_field: where the client gave these, for
            messages.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: str | Mapping[str, str] = "auto"
    parallel_tool_calls: bool = True
    grammar: Mapping[str, Any] | None = None
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    effort: str | None = None
    default_effort: str | None = None
    thinking: bool | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    stop: Sequence[str] = ()
    continue_final: bool = False
    is_cut: bool = False
    is_streamed: bool = False
    grammar_field: str = "response_format"
    effort_field: str = "reasoning_effort"
    logprobs_field: str = "logprobs"


@dataclass(frozen=True)
class Prompt:
    """Tokens that are to be continued, and what the start of a request says of them."""

    tokens: list[int]
    boundaries: list[int] = field(default_factory=list)
    initial_state: str = "normal"


async def begin(ranks: Ranks, config: Config, conversation: Conversation) -> Generation:
    """Start the answer to a conversation.

    Raises: Refusal, Mistake or Unavailable, with what the client is to read.
    """
    return (await begin_all(ranks, config, conversation, 1))[0]


async def begin_all(
    ranks: Ranks, config: Config, conversation: Conversation, count: int
) -> list[Generation]:
    """Start several answers to a conversation, each with a seed of its own.

    Raises: Refusal, Mistake or Unavailable, with what the client is to read.
    """
    ready = ready_ranks(ranks)
    check_room(ranks, config, count)
    shown, grammar = _tools(conversation)
    prompt = await encode(ranks, conversation)
    if grammar is not None:
        is_reasoning = prompt.initial_state == "reasoning"
        grammar = {**grammar, "after_reasoning": is_reasoning}
        await _check_grammar(ranks, grammar, conversation.grammar_field)
    given = {**conversation.settings, "grammar": grammar}
    settings = complete(config, ready, prompt, given, is_cut=conversation.is_cut)
    start = Start(
        id="",
        prompt=prompt.tokens,
        settings=settings,
        stop=list(conversation.stop),
        initial_state=prompt.initial_state,
        tools=[dict(tool) for tool in shown] or None,
        boundaries=prompt.boundaries,
        parallel_tool_calls=conversation.parallel_tool_calls,
        is_chat=True,
        goes_on=conversation.continue_final,
    )
    return admit(
        ranks,
        config,
        choices(start, count),
        is_streamed=conversation.is_streamed,
        logprobs_field=conversation.logprobs_field,
    )


async def encode(ranks: Ranks, conversation: Conversation) -> Prompt:
    """Turn a conversation into tokens, by the model's chat template.

    Raises: Refusal, Mistake or Unavailable, with what the client is to read.
    """
    ready = ready_ranks(ranks)
    shown, _ = _tools(conversation)
    result = await ranks.call(
        "chat",
        messages=[dict(message) for message in conversation.messages],
        tools=[dict(tool) for tool in shown] or None,
        template_arguments={
            **_reasoning_arguments(ready, conversation),
            **conversation.template_arguments,
        },
        continue_final=conversation.continue_final,
    )
    return Prompt(result["tokens"], result["boundaries"], result["initial_state"])


def _reasoning_arguments(ready: Ready, conversation: Conversation) -> dict[str, Any]:
    """The arguments by which a conversation turns reasoning on, off, up or down.

    Raises: Refusal (400) for an effort that is not the default, where the chat template
        reads none of them. "none" is what a model that cannot reason does anyway.
    """
    arguments: dict[str, Any] = {}
    effort = conversation.effort
    if effort is not None:
        arguments = {"reasoning_effort": effort, "enable_thinking": effort != "none"}
    if conversation.thinking is not None:
        arguments["enable_thinking"] = conversation.thinking
    known = {n: x for n, x in arguments.items() if n in ready.reasoning_arguments}
    is_so = effort in (None, conversation.default_effort)
    is_so = is_so or (effort == "none" and not ready.has_reasoning)
    if not (known or is_so):
        raise Refusal(
            400,
            f"{conversation.effort_field} is {effort!r}: this model's chat template "
            "cannot turn reasoning up, down or off",
            param=conversation.effort_field,
            code="unsupported",
        )
    return known


def ready_ranks(ranks: Ranks) -> Ready:
    """Give what the ranks said when they were ready.

    While another job is to come, requests wait for it.

    Raises: Refusal (503) before, and when no more requests are taken.
    """
    state = "draining" if ranks.is_draining else ranks.state
    if state not in ("ready", "recovering") or ranks.ready is None:
        raise Refusal(
            503,
            f"the server is {state}: {ranks.words}",
            code=state,
            retry_seconds=5,
        )
    return ranks.ready


def model_names(ranks: Ranks, config: Config) -> list[str]:
    """Give the names that requests may use: those it is served by, and its own."""
    names = [*config.model_names]
    if ranks.ready is not None and ranks.ready.model not in names:
        names.append(ranks.ready.model)
    return names


def checked_model(ranks: Ranks, config: Config, model: str | None) -> str:
    """Give the name of the model that a request asks for; without one it is the first.

    Raises: Refusal (404), with the names that there are.
    """
    names = model_names(ranks, config)
    if model is None:
        return names[0]
    if model not in names:
        raise Refusal(
            404,
            f"there is no model {model!r}; this server has: {', '.join(names)}",
            param="model",
            code="model_not_found",
        )
    return model


async def _check_grammar(ranks: Ranks, grammar: Mapping[str, Any], field: str) -> None:
    """Let rank 0 compile a grammar that comes of a field, or of the tools.

    Raises: Refusal (400), with what the grammar library says against it.
    """
    try:
        await ranks.call("check_grammar", grammar=dict(grammar))
    except Mistake as error:
        param = "tools" if grammar["kind"] == "tools" else field
        raise Refusal(400, f"{param}: {error}", param=param) from error


def complete(
    config: Config,
    ready: Ready,
    prompt: Prompt,
    given: Mapping[str, Any],
    *,
    max_tokens: int | None = None,
    is_cut: bool = False,
) -> Settings:
    """Fill in what a request left open, and check that it fits into the context.

    What it left open is the command line's, then generation_config.json's, then
    OpenAI's default, which is `Settings`' and for `max_tokens` as given here.

    Raises: Refusal (400), with the numbers.
    """
    length, context = len(prompt.tokens), ready.context
    if not length:
        raise Refusal(400, "the prompt is empty: it needs at least one token")
    wanted = given.get("max_tokens")
    least = 0 if wanted == 0 else 1
    if length + least > context:
        raise _too_long(f"{length} tokens > {context - least} maximum", context)
    if wanted is not None and length + wanted > context and not is_cut:
        words = f"it has {length} tokens, and max_tokens asks for {wanted} more"
        raise _too_long(words, context)
    for token in given.get("logit_bias") or ():
        if not 0 <= token < ready.vocabulary:
            raise Refusal(
                400,
                f"logit_bias: {token} is no token; the model has 0 to "
                f"{ready.vocabulary - 1}",
                param="logit_bias",
            )
    settings = Settings(
        **{
            "max_tokens": max_tokens,
            "seed": secrets.randbits(63),
            **ready.defaults,
            **config.defaults,
            **{name: x for name, x in given.items() if x is not None},
        }
    )
    room, most = context - length, settings.max_tokens
    return replace(
        settings,
        max_tokens=room if most is None else min(most, room),
    )


def choices(start: Start, count: int) -> list[Start]:
    """Make `count` requests of one: each has its own id, and a seed after the first's.

    The first has the seed itself, so it is what a request for one choice gives.
    """
    seed = start.settings.seed
    return [
        replace(
            start,
            id=secrets.token_hex(12),
            settings=replace(
                start.settings, seed=_derived(seed, index) if index else seed
            ),
        )
        for index in range(count)
    ]


def check_room(ranks: Ranks, config: Config, count: int) -> None:
    """Look whether the queue has room for so many requests.

    Raises: Refusal: 429 where it has none, 400 where it never has.
    """
    room = config.max_concurrency + config.max_queue
    if count > room:
        raise Refusal(
            400,
            f"the request asks for {count} answers at once; this server takes at most "
            f"{room}",
            param="n",
        )
    running, waiting = ranks.running_and_waiting()
    if running + waiting + count > room:
        raise Refusal(
            429,
            f"the queue is full: {running} requests run, {waiting} wait, and together "
            f"they may be {room}",
            code="queue_full",
            retry_seconds=1,
        )


def admit(
    ranks: Ranks,
    config: Config,
    starts: Sequence[Start],
    *,
    is_streamed: bool,
    logprobs_field: str = "logprobs",
) -> list[Generation]:
    """Hand requests to the ranks, all or none.

    Those with an Idempotency-Key go on where they were begun. `is_streamed` and
    `logprobs_field` are a `Conversation`'s.

    Raises: Refusal, as `check_room`, `ready_ranks` and `Journal.begin`; 400 for answers
        that cost too much together.
    """
    _check_cost(starts)
    _check_logprobs(starts, logprobs_field, is_streamed=is_streamed)
    ready_ranks(ranks)  # both may have changed while prompts were encoded
    check_room(ranks, config, len(starts))
    asked = asked_now.get()
    if asked is not None and config.journal is not None:
        starts = config.journal.begin(asked, starts)
    return [ranks.start(start) for start in starts]


def _check_cost(starts: Sequence[Start]) -> None:
    """Raise Refusal for prompts that are too long together, and for too many biases."""
    tokens = sum(len(start.prompt) for start in starts)
    if len(starts) > 1 and tokens > MOST_PROMPT_TOKENS:
        raise Refusal(
            400,
            f"{len(starts)} answers at once, whose prompts have {tokens:,} tokens "
            f"together; at most {MOST_PROMPT_TOKENS:,} are taken",
            param="n",
        )
    biases = sum(len(start.settings.logit_bias) for start in starts)
    if biases > MOST_BIASES:
        raise Refusal(
            400,
            f"logit_bias: {biases:,} entries, counted for each answer; at most "
            f"{MOST_BIASES:,} are taken: give fewer, or ask for fewer answers",
            param="logit_bias",
        )


def _check_logprobs(starts: Sequence[Start], field: str, *, is_streamed: bool) -> None:
    """Raise Refusal where more log-probabilities may be kept than there is room for."""
    of_prompts = of_answers = 0
    for start in starts:
        settings = start.settings
        if settings.prompt_logprobs is not None:
            of_prompts += len(start.prompt) * (settings.prompt_logprobs + 1)
        if settings.logprobs is not None and not is_streamed:
            assert settings.max_tokens is not None  # `complete` has filled it in
            of_answers += settings.max_tokens * (settings.logprobs + 1)
    count = of_prompts + of_answers
    if count <= MOST_LOGPROBS:
        return
    remedy = "ask for fewer tokens or answers"
    if of_answers and of_prompts <= MOST_LOGPROBS:
        remedy += ", or for a stream of completions, which keeps none of its answers'"
    raise Refusal(
        400,
        f"{field}: the request may have {count:,} log-probabilities, counted as tokens "
        f"x answers x (likeliest tokens + 1); at most {MOST_LOGPROBS:,} are kept: "
        f"{remedy}",
        param=field,
    )


def _tools(
    conversation: Conversation,
) -> tuple[Sequence[Mapping[str, Any]], Mapping[str, Any] | None]:
    """The tools that the model is shown, and the grammar that its answer follows.

    With the choice "none" the model sees no tools, and nothing is taken for a call.
    """
    tools, choice = conversation.tools, conversation.tool_choice
    if choice == "none" or (choice == "auto" and not tools):
        return (), conversation.grammar
    if choice == "auto":
        return tools, conversation.grammar
    if choice == "required":
        forced = tools
        words = "tool_choice is 'required', and there are no tools"
    else:
        assert not isinstance(choice, str)
        forced = [t for t in tools if t["function"]["name"] == choice["name"]]
        names = ", ".join(tool["function"]["name"] for tool in tools) or "none"
        words = f"there is no tool {choice['name']!r}; the tools are: {names}"
    if not forced:
        raise Refusal(400, words, param="tool_choice")
    if conversation.grammar is not None:
        field = conversation.grammar_field
        raise Refusal(
            400,
            f"an answer that must be a tool call cannot follow {field} as well",
            param=field,
        )
    return tools, {
        "kind": "tools",
        "tools": [dict(tool) for tool in forced],
        "parallel": conversation.parallel_tool_calls,
    }


def _too_long(words: str, context: int) -> Refusal:
    """Say it as Anthropic does, then as OpenAI does.

    Agents look for these very words, and then shorten the conversation.
    """
    return Refusal(
        400,
        f"prompt is too long: {words}. This model's maximum context length is "
        f"{context} tokens on this server",
        code="context_length_exceeded",
    )


def _derived(seed: int, index: int) -> int:
    """The seed of a choice, from that of the request."""
    digest = hashlib.sha256(f"{seed} {index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
