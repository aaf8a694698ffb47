"""Take the text of an answer apart: what is said, reasoning, calls of tools."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_lm.generate import TextStateMachine, make_text_state_machine
from mlx_lm.tool_parsers import json_tools

from mlxtp.serve.messages import Start
from mlxtp.serve.ranks.text import Text

# ("text", text), ("reasoning", text) or ("tool", {"name": ..., "arguments": JSON text})
Piece = tuple[str, Any]

# Enough of the prompt that the text goes on as in one piece.
_PROMPT_TAIL = 8
# Arrays and objects in each other, in a call's arguments. Bodies are read 200 deep, and
# a client may give the call back within one.
DEEPEST = 190


class AnswerText:
    """The text of one answer: tokens go in, pieces of text come out.

    Markers of reasoning, the form of tool calls and the detokenizer are mlx-lm's. Text
    that may be the beginning of a marker, of a stop text or of a character is held back
    until that is decided; a call of a tool, until it is whole. What was meant as a call
    and is none is given as the text that it is.

    Args:
        text: of the model.
        start: the request.

    Attributes:
        replayed: pieces of the tokens that it has `generated`.
        stopped: the text of `start.stop` that ended the answer.
        is_over: nothing more will be shown: a text has ended the answer, or the one
            call that was asked for is there.
        has_tool_calls: a call was given.
    """

    def __init__(self, text: Text, start: Start) -> None:
        self.stopped: str | None = None
        self.is_over = self.has_tool_calls = False
        grammar = start.settings.grammar if start.is_chat else None
        self._is_calls = grammar is not None and grammar["kind"] == "tools"
        self._calls = ""  # JSON of a grammar's calls
        self._call: str | None = None  # what is there of a call
        self._is_behind_call = False
        self._pieces: list[Piece] = []
        self._start, self._format = start, _format(text, start)
        tokenizer = text.tokenizer
        self._parse = tokenizer.tool_parser or json_tools.parse_tool_call
        self._known, self._ends = text.known, tokenizer.eos_token_ids
        self._stops = [*start.stop]
        if start.is_chat and grammar is None:
            self._stops += text.stop
        self._state = _beginning(self._format, self._stops, start.initial_state)
        self._detokenizer = tokenizer.detokenizer
        is_new = start.is_chat and not start.goes_on
        if not is_new or start.settings.grammar is not None:
            # All of the text counts, also a space that it begins with.
            for token in start.prompt[-_PROMPT_TAIL:]:
                self._add(token)
            self._detokenizer.last_segment  # noqa: B018  takes it
        self.replayed = [
            piece for token in start.generated for piece in self.push(token)
        ]

    def push(self, token: int) -> list[Piece]:
        """Take the next token; return the text that is decided by it."""
        if not self.is_over:
            self._add(token)
            self._split(self._detokenizer.last_segment)
        return self._given()

    def finish(self, reason: str) -> list[Piece]:
        """Return what was held back, at the end of the answer.

        Args:
            reason: "length" cuts a call short; at a "stop" one may lack its end.
        """
        if not self.is_over:
            self._detokenizer.finalize()
            self._split(self._detokenizer.last_segment)
        if not self.is_over:
            self._state, rest, state = TextStateMachine.flush(self._state)
            self._take(state, rest)
            self._close(is_cut=reason == "length")
        return self._given()

    def _add(self, token: int) -> None:
        if token in self._known and token not in self._ends:
            self._detokenizer.add_token(token)

    def _given(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces

    def _split(self, text: str) -> None:
        self._state, segments = TextStateMachine.split(self._state, text)
        for state, part in segments:
            if self.is_over:
                return
            self._take(state, part)

    def _take(self, state: str | int, text: str) -> None:
        """Take text of a state; that of a stop text is its number."""
        if isinstance(state, int):
            self._close(is_cut=True)
            self.is_over = True
            if state < len(self._start.stop):
                self.stopped = self._start.stop[state]
        elif state == "tool":
            self._call = (self._call or "") + text
        else:
            if self._call is not None:
                self._end_call(self._format.tool_call_end)
            if state == "reasoning":
                self._give("reasoning", text)
            elif state == "normal":
                self._say(text)

    def _close(self, *, is_cut: bool) -> None:
        """End what is open: a call without its end, or the calls of a grammar."""
        if self._call is not None:
            can_be_whole = not (is_cut and self._format.tool_call_end)
            self._end_call("", can_be_whole=can_be_whole)
        if self._is_calls:
            calls, rest = _read_calls(self._calls)
            for call in calls:
                self._give_call(call)
            self._give("text", rest)

    def _say(self, text: str) -> None:
        if self._is_calls:
            # White space may come with the end of the reasoning, in one token.
            self._calls = (self._calls + text).lstrip()
            return
        if self._is_behind_call:
            text = text.lstrip()
            self._is_behind_call = not text
        self._give("text", text)

    def _give(self, kind: str, text: str) -> None:
        if self._pieces and self._pieces[-1][0] == kind:
            text = self._pieces.pop()[1] + text
        if text and not self.is_over:
            self._pieces.append((kind, text))

    def _give_call(self, call: dict[str, str]) -> None:
        if self.is_over:
            return
        self._pieces.append(("tool", call))
        self.has_tool_calls = self._is_behind_call = True
        self.is_over = not self._start.parallel_tool_calls

    def _end_call(self, end: str, *, can_be_whole: bool = True) -> None:
        """Give the calls that the text of one is, or the text."""
        assert self._call is not None
        text, self._call = self._call, None
        try:
            if not can_be_whole:
                raise ValueError("cut short")
            parsed = self._parse(text, self._start.tools)
            calls = parsed if isinstance(parsed, list) else [parsed]
            result = [_checked(call, self._start.tools or ()) for call in calls]
            if not result:
                raise ValueError("no call")
        except Exception:  # parsers meet what a model writes, and raise what they like
            self._say(f"{self._format.tool_call_start}{text}{end}")
        else:
            for call in result:
                self._give_call(call)


@dataclass(frozen=True)
class _Format:
    """What `make_text_state_machine` asks of a tokenizer: how answers are marked."""

    think_start: str | None = None
    think_end: str | None = None
    tool_call_start: str = ""
    tool_call_end: str = ""
    structural_markers: Sequence[str] = ()
    response_transitions: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    @property
    def has_thinking(self) -> bool:
        return self.think_start is not None

    @property
    def has_tool_calling(self) -> bool:
        return bool(self.tool_call_start)


def _format(text: Text, start: Start) -> _Format:
    """How the answers of a request are marked."""
    tokenizer, grammar = text.tokenizer, start.settings.grammar
    if not start.is_chat:
        return _Format()
    if grammar is not None:
        # What follows the grammar is all text, whatever it reads like.
        end = [(tokenizer.think_end, "normal")]
        after_reasoning = grammar.get("after_reasoning", False)
        return _Format(
            response_transitions={"reasoning": end} if after_reasoning else {}
        )
    transitions = {
        state: [edge for edge in edges if start.tools or edge[1] != "tool"]
        for state, edges in tokenizer.response_transitions.items()
    }
    tools: dict[str, str] = {}
    if start.tools:
        parser = tokenizer if tokenizer.has_tool_calling else json_tools
        tools = {
            "tool_call_start": parser.tool_call_start,
            "tool_call_end": parser.tool_call_end,
        }
    return _Format(
        tokenizer.think_start,
        tokenizer.think_end,
        **tools,
        structural_markers=tokenizer.structural_markers,
        response_transitions=transitions,
    )


def _beginning(format_: _Format, stops: Sequence[str], initial: str) -> Any:
    """The state of a machine that goes to a state of its own behind a stop text."""
    machine = make_text_state_machine(format_, stops)
    machine.make_state("normal")  # may be where a marker leads, and has none itself
    known = {"normal", *format_.response_transitions}
    known |= {"reasoning"} if format_.has_thinking else set()
    state = machine.make_state(initial if initial in known else "normal")
    name, node, states, held = state
    # mlx-lm's machine stays where it is; the edges of stop texts are each state's last.
    count = len(stops)
    states = {
        of: (trie, [*ends[: len(ends) - count], *range(count)])
        for of, (trie, ends) in states.items()
    }
    nowhere = TextStateMachine().make_state()[1]
    states |= {number: (nowhere, []) for number in range(count)}
    return name, node, states, held


def _checked(call: Any, tools: Sequence[dict[str, Any]]) -> dict[str, str]:
    """A call as pieces have it.

    Raises: ValueError or TypeError if it is not the call of one of the tools, with
        arguments that are a JSON object.
    """
    name, arguments = call["name"], call.get("arguments", {})
    if name not in [tool["function"]["name"] for tool in tools]:
        raise ValueError(f"no tool is called {name!r}")
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(arguments, dict):
        raise ValueError(f"arguments of {name} are no object")
    _check_depth(arguments)
    return {"name": name, "arguments": _json(arguments)}


def _read_calls(text: str) -> tuple[list[dict[str, str]], str]:
    """Read an array of calls, as their grammar writes it, as far as it goes.

    Returns: the calls, and the text behind them: of one without an end, or of none.
    """
    calls: list[dict[str, str]] = []
    position = 1
    while position < len(text):
        try:
            call, end = json.JSONDecoder().raw_decode(text, position)
            name = call["name"]
            _check_depth(call["arguments"])
        # No end, nested too deeply, or no call at all.
        except (ValueError, RecursionError, TypeError, LookupError):
            return calls, text[position if calls else 0 :]
        # As the model wrote them: 1e400 is JSON, and would be read as infinity.
        arguments = text[position : end - 1].partition(',"arguments":')[2]
        calls.append({"name": name, "arguments": arguments})
        position = end + 1  # behind a comma, or the end of the array
    return calls, ""


def _check_depth(arguments: Any) -> None:
    """Raise ValueError for arguments that are nested too deeply.

    By levels: how deep recursion may go depends on who calls.
    """
    level = [arguments]
    for _ in range(DEEPEST + 1):
        level = [one for one in level if isinstance(one, dict | list | tuple)]
        if not level:
            return
        level = [
            inner
            for one in level
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
    raise ValueError(f"arguments are nested more than {DEEPEST} deep")


def _json(arguments: dict[str, Any]) -> str:
    """Write arguments as JSON that can be encoded: half of a surrogate pair cannot.

    Raises: ValueError or TypeError for what JSON has no form for.
    """
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(arguments)
    return text
