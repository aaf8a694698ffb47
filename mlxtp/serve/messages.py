"""What the front and rank 0 tell each other: lines of JSON over a local socket.

For each job the front makes a folder that only its user can enter, with a Unix socket
in it and a file that holds a key. `FOLDER_VARIABLE` names it. Rank 0 connects and
sends the key; then each message is one line: an object whose "is" names the class.

    front -> rank 0    Call, Start, Cancel, End
    rank 0 -> front    Hello, State, Refused, Ready, Answer, Events, Stats
"""

import functools
import json
from dataclasses import dataclass, field
from typing import Any, get_args

from pydantic import TypeAdapter

from mlxtp.generation.settings import Settings

FOLDER_VARIABLE = "MLXTP_SERVE_FOLDER"
SOCKET_NAME = "ranks"
KEY_NAME = "key"

# The longest line that the front reads: log-probabilities of all tokens of a prompt.
LONGEST_LINE = 1 << 30
# The longest `Answer`, in bytes: the front reads it between two events of others.
LONGEST_ANSWER = 64 << 20


# From the front to rank 0.


@dataclass(frozen=True)
class Call:
    """Ask rank 0 for something that needs the tokenizer; an `Answer` comes back.

    `name` is a method of `serve.ranks.text.Text`, `arguments` its keyword arguments.
    """

    call: int
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Start:
    """Generate for a request.

    Args:
        id: of the request, never used before.
        prompt: tokens (L,), at least one.
        generated: tokens (L,) that the request already has: where a job before this one
            ended. They are read like the prompt.
        tells_generated: tell these, too, in one event: their client is a new one.
        finished: the `finish` of an answer of which `generated` is all: it is told, and
            nothing is generated.
        settings: how tokens are drawn.
        stop: texts that end the answer, and are not part of it.
        initial_state: in which the text begins: "normal" or "reasoning".
        tools: OpenAI's, for the parser of tool calls; None parses none.
        boundaries: lengths of the prompt at which a turn ends: caches that cannot be
            taken back are kept there.
        parallel_tool_calls: False ends the answer behind the first tool call.
        is_chat: False gives all text as it stands, without reasoning or tools.
        goes_on: the answer goes on with the text that the prompt ends with.
    """

    id: str
    prompt: list[int]
    settings: Settings
    generated: list[int] = field(default_factory=list)
    stop: list[str] = field(default_factory=list)
    initial_state: str = "normal"
    tools: list[dict[str, Any]] | None = None
    boundaries: list[int] = field(default_factory=list)
    parallel_tool_calls: bool = True
    is_chat: bool = False
    goes_on: bool = False
    tells_generated: bool = False
    finished: str | None = None


@dataclass(frozen=True)
class Cancel:
    """Forget a request: its client has gone."""

    id: str


@dataclass(frozen=True)
class End:
    """End all ranks, in order."""


# From rank 0 to the front.


@dataclass(frozen=True)
class Hello:
    """The first line: the key."""

    key: str


@dataclass(frozen=True)
class State:
    """What the job does before it is ready: words, and the part that is done."""

    words: str
    done: float | None = None


@dataclass(frozen=True)
class Refused:
    """The job ends: these ranks cannot have the model; `words` say why."""

    words: str


@dataclass(frozen=True)
class Rank:
    """A rank, as `/cluster` shows it. Bytes of weights, and of the limit for caches."""

    rank: int
    host: str
    share: float
    chip: str
    weights_bytes: int
    cache_limit_bytes: int
    memory_bytes: int


@dataclass(frozen=True)
class Ready:
    """The model is loaded.

    Args:
        model: its name.
        context: the most tokens of a request, prompt and answer.
        vocabulary: how many tokens the model knows.
        defaults: what generation_config.json says of sampling, in `Settings`' names.
        ranks: one for each.
        has_template: the tokenizer has a chat template of its own.
        has_tools: it has a parser of tool calls of its own.
        has_reasoning: it marks reasoning.
        is_batched: several requests at once; else one after the other.
        notes: lines for the log, such as what the model lacks.
        links: how arrays travel, in words.
        reasoning_arguments: which arguments that turn reasoning on, off, up or down the
            chat template reads, of "enable_thinking" and "reasoning_effort".
        commit: of a model of the hub; None for a folder.
    """

    model: str
    context: int
    vocabulary: int
    defaults: dict[str, Any]
    ranks: list[Rank]
    has_template: bool
    has_tools: bool
    has_reasoning: bool
    is_batched: bool
    notes: list[str] = field(default_factory=list)
    links: str = ""
    reasoning_arguments: list[str] = field(default_factory=list)
    commit: str | None = None


@dataclass(frozen=True)
class Answer:
    """What a `Call` returned, or the mistake that was found in its arguments."""

    call: int
    result: Any = None
    error: str | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """A token with its log-probability. `text` may be partial: then `bytes` has it."""

    token: int
    text: str
    bytes: list[int]
    logprob: float
    top: list["TokenLogprob"] = field(default_factory=list)


@dataclass(frozen=True)
class Event:
    """What has become of a request in a step.

    Args:
        id: of the request.
        admitted: it has left the queue; `cached` tokens of its prompt were in the
            prefix cache.
        cached: see `admitted`.
        read: tokens of the prompt that have been read so far; None if unchanged.
        tokens: new ones, those that end the text among them.
        pieces: new text, in order: ("text", text), ("reasoning", text) or
            ("tool", {"name": ..., "arguments": JSON text}).
        logprobs: of `tokens`, where the request asks for them.
        prompt_logprobs: of the next of the prompt's tokens, once, where the request
            asks; None stands for the first.
        finish: "stop", "length", "tool_calls" or "error"; nothing comes behind it.
        stop: the text of `Start.stop` that ended it.
        error: what was wrong, in words, where `finish` is "error".
        is_mistake: the error is the request's (400), not the server's.
        is_told_again: `tokens` are those that the request was started with.
    """

    id: str
    admitted: bool = False
    cached: int = 0
    read: int | None = None
    tokens: list[int] = field(default_factory=list)
    pieces: list[tuple[str, Any]] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] | None = None
    finish: str | None = None
    stop: str | None = None
    error: str | None = None
    is_mistake: bool = False
    is_told_again: bool = False


@dataclass(frozen=True)
class Events:
    """What has become of all requests in a step."""

    events: list[Event]


@dataclass(frozen=True)
class RankStats:
    """Of one rank since the start: seconds, bytes."""

    rank: int
    collective_seconds: float
    sent_bytes: int
    memory_bytes: int
    peak_memory_bytes: int


@dataclass(frozen=True)
class Stats:
    """How the job is, about once a second while it works.

    Args:
        running: requests that are read or decode.
        waiting: requests that rank 0 has and has not admitted.
        cache_use: the part of the limit that caches take on the fullest rank, 0 to 1.
        prefix_entries, prefix_bytes: what the prefix cache holds, on the fullest rank.
        prefix_queries, prefix_hits: tokens of prompts that were looked up and found.
        preemptions: requests that were set back because memory got short.
        steps: passes that were made.
        step_seconds: the median of the last passes that only decode; None before.
        ranks: one for each.
        drafts: how often a request has drafted tokens.
        drafted, accepted: how many tokens these were, and how many the model took.
    """

    running: int
    waiting: int
    cache_use: float
    prefix_entries: int
    prefix_bytes: int
    prefix_queries: int
    prefix_hits: int
    preemptions: int
    steps: int
    step_seconds: float | None
    ranks: list[RankStats]
    drafts: int = 0
    drafted: int = 0
    accepted: int = 0


FromFront = Call | Start | Cancel | End
FromRank0 = Hello | State | Refused | Ready | Answer | Events | Stats
Message = FromFront | FromRank0


def encoded(message: Message) -> bytes:
    """Write a message as a line."""
    content = {"is": type(message).__name__, **vars(message)}
    # What stands in a message are plain data and dataclasses.
    return json.dumps(content, separators=(",", ":"), default=vars).encode() + b"\n"


def decoded(line: bytes) -> Message:
    """Read a line.

    Raises: ValueError if it is no message.
    """
    try:
        content = json.loads(line)
        message: Message = _reader(content.pop("is")).validate_python(content)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"not a message: {line[:200]!r}") from error
    return message


@functools.cache
def _reader(kind: str) -> TypeAdapter[Any]:
    """What reads a kind of message."""
    kinds = {message.__name__: message for message in get_args(Message)}
    return TypeAdapter(kinds[kind])
