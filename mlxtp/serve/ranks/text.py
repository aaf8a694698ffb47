"""The tokenizer's work for the front: chats to tokens, tokens to text and back."""

import codecs
import inspect
import json
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import takewhile
from typing import Any

from jinja2.defaults import DEFAULT_NAMESPACE
from mlx_lm.tokenizer_utils import TokenizerWrapper
from transformers import PreTrainedTokenizerBase

from mlxtp.generation.grammar import Grammars, Spec
from mlxtp.generation.prompt import Message, check_prefill, check_tokens, rendered
from mlxtp.generation.prompt import tokens_of as tokens_of_text
from mlxtp.generation.token_bytes import known_tokens, token_bytes

# For models without a chat template. Calls of tools are as in mlx-lm's `json_tools`.
PLAIN_TEMPLATE = """\
{%- if tools -%}
System: These tools can be called:
{% for tool in tools %}{{ tool.function | tojson }}
{% endfor %}A call is <tool_call>{"name": ..., "arguments": {...}}</tool_call>
{% endif -%}
{%- for message in messages -%}
{{ message.role | capitalize }}: {{ message.content }}
{%- for call in message.tool_calls -%}
<tool_call>{{ {"name": call.function.name, "arguments": call.function.arguments}
| tojson }}</tool_call>
{%- endfor -%}
{{ "\\n" }}
{%- endfor -%}
{%- if add_generation_prompt -%}Assistant:{%- endif -%}"""
# A model that was taught no turns would go on with the user's.
PLAIN_STOP = "\nUser:"

# What the template is told by us, so that a request cannot tell it something else.
_INTERNAL = {
    *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters,
    *DEFAULT_NAMESPACE,
    "messages",
    "raise_exception",
    "strftime_now",
} - {"documents"}
_LONGEST_PROMPT = 32 << 20  # characters
# A text of more characters for each token of the context is too long, most likely.
_CHARACTERS = 16


class Template:
    """The chat template of a model, and what it takes.

    Args:
        tokenizer: mlx-lm's, of the model.
        ignore: write chats plainly, as for a model without a template.

    Attributes:
        is_there: the model has one, and it is not ignored.
        has_tools, has_reasoning: the model has a form of tool calls, a mark for its
            reasoning.
    """

    def __init__(self, tokenizer: TokenizerWrapper, *, ignore: bool = False) -> None:
        self._tokenizer = tokenizer
        self.is_there = tokenizer.has_chat_template and not ignore
        self.has_tools = tokenizer.has_tool_calling
        self.has_reasoning = tokenizer.has_thinking

    def reads(self, name: str) -> bool:
        """Whether it reads a variable of this name; a program may any."""
        template: Any = PLAIN_TEMPLATE
        if self.is_there:
            template = self._tokenizer.chat_template
            if self._tokenizer._chat_template is not None or template is None:
                return True
        return re.search(rf"\b{re.escape(name)}\b", str(template)) is not None

    def check(self, arguments: Mapping[str, Any], field: str) -> None:
        """Raise ValueError for arguments that it is not to get, or does not know.

        What is off anyway can be switched off. `field` is where they were given.
        """
        internal = _INTERNAL | {*self._tokenizer.special_tokens_map}
        for name, value in arguments.items():
            if name in internal:
                raise ValueError(f"{field}: {name} cannot be set")
            if name == "enable_thinking" and not value and not self.has_reasoning:
                continue
            if not self.reads(name):
                raise ValueError(
                    f"{field}: the model's chat template takes no argument {name}"
                )


class Text:
    """The tokenizer of the model, as the front calls it; any thread may.

    Results are plain data. What is wrong in the arguments is a ValueError.

    Args:
        tokenizer: mlx-lm's, of the model.
        rows: V, of the model's vocabulary.
        context: the most tokens of a request.
        template_arguments: for the chat template, where a request gives no others.
        template: how chats are written; None for the model's, if it has one.
        grammars: what checks grammars, shared with the engine; None makes one.

    Attributes:
        notes: lines for the log, on what the model lacks.
        template: how chats are written.
        stop: texts that end an answer to a chat, beside those of the request.
        known: the tokens that have a text.
    """

    def __init__(
        self,
        tokenizer: TokenizerWrapper,
        rows: int,
        *,
        context: int = 1 << 20,
        template_arguments: Mapping[str, Any] | None = None,
        template: Template | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        self.tokenizer, self.rows, self._context = tokenizer, rows, context
        self.template = template or Template(tokenizer)
        self.known = frozenset(known_tokens(tokenizer, rows))
        self.stop = () if self.template.is_there else (PLAIN_STOP,)
        self.notes = []
        if not self.template.is_there:
            self.notes.append(
                "the model has no chat template: chats are written plainly, as "
                "'User: ...' and 'Assistant: ...', tools as JSON"
            )
        elif not self.template.has_tools and self.template.reads("tools"):
            self.notes.append(
                "mlx-lm has no parser for this model's tool calls: they are expected "
                'as <tool_call>{"name": ..., "arguments": ...}</tool_call>'
            )
        self._grammars = grammars or Grammars(tokenizer, rows)
        self._arguments = dict(template_arguments or {})
        # The first call sets a fast tokenizer's state, later ones only read it.
        tokenizer.encode("a")

    def chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_arguments: Mapping[str, Any] | None = None,
        continue_final: bool = False,
    ) -> dict[str, Any]:
        """Write a chat as the prompt of its next message.

        Args:
            messages: OpenAI's, with text for content.
            tools: OpenAI's.
            template_arguments: for the chat template, by name.
            continue_final: the model goes on with the last message, an assistant's.

        Returns: "tokens" (L,); "boundaries", lengths of the prompt that another prompt
            may share: behind system prompt and tools, and where the next turn goes on;
            "initial_state", in which the answer begins: "normal", "reasoning", or one
            of the model's format.

        Raises: ValueError if the template raises, leaves messages or tools out, or does
            not know an argument.
        """
        if not messages:
            raise ValueError("messages: a chat needs at least one")
        arguments = {**self._arguments, **(template_arguments or {})}
        self.template.check(arguments, "chat_template_kwargs")
        prepared = [self._prepared(message) for message in messages]
        chat = _Chat(self, prepared, tools, arguments)
        text = chat.write(chat.messages, answers=continue_final)
        if len(text) > _LONGEST_PROMPT:
            raise ValueError(
                f"the chat template makes {len(text)} characters of these messages; at "
                f"most {_LONGEST_PROMPT} are read"
            )
        self._check_length(text)
        chat.check(text, answers=continue_final)
        tokens = self._checked(self._encoded(text))
        shared = chat.shared_prefixes(text, answers=continue_final)
        lengths = {_common(tokens, self._encoded(text[:stop])) for stop in shared}
        return {
            "tokens": tokens,
            "boundaries": sorted(lengths - {0}),
            "initial_state": self._initial_state(chat, text, answers=continue_final),
        }

    def text(self, text: str) -> dict[str, Any]:
        """The "tokens" of a prompt, with the special ones that mlx-lm puts before."""
        self._check_length(text)
        return {"tokens": self._checked(tokens_of_text(text, self.tokenizer))}

    def tokens(self, tokens: Sequence[int]) -> dict[str, Any]:
        """The "tokens" of a prompt that is given as such."""
        return {"tokens": self._checked(list(tokens))}

    def tokenize(self, text: str, add_special_tokens: bool = True) -> dict[str, Any]:
        """The "tokens" of a text, and the "strings" that the tokenizer calls them."""
        self._check_length(text)
        tokens = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        names = self.tokenizer.convert_ids_to_tokens(tokens)
        return {"tokens": tokens, "strings": [_shown(name) for name in names]}

    def detokenize(self, tokens: Sequence[int]) -> dict[str, Any]:
        """The "text" of tokens, special ones included."""
        check_tokens(tokens, self.rows, self.tokenizer)
        return {"text": self.tokenizer.decode(tokens)}

    def decode_each(self, tokens: Sequence[int]) -> dict[str, Any]:
        """The "texts" and "bytes" of tokens, and their "offsets" in all characters.

        A part of a character is shown as U+FFFD.
        """
        check_tokens(tokens, self.rows, self.tokenizer)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        offsets, length = [], 0
        for token in tokens:
            offsets.append(length)
            length += len(decoder.decode(self.bytes_of[token]))
        encoded = [self.bytes_of[token] for token in tokens]
        return {
            "texts": [one.decode(errors="replace") for one in encoded],
            "bytes": [[*one] for one in encoded],
            "offsets": offsets,
        }

    def check_grammar(self, grammar: Spec) -> dict[str, Any]:
        """Return nothing if texts can be made to follow a grammar.

        Raises: ValueError if they cannot.
        """
        self._grammars.check(grammar)
        return {}

    @cached_property
    def bytes_of(self) -> list[bytes]:
        """The bytes of each token (V,)."""
        return token_bytes(self.tokenizer, self.rows)

    def _prepared(self, message: Message) -> Message:
        """A message as templates want it: with text, and arguments of calls as objects.

        Raises: ValueError if arguments are no JSON object.
        """
        result = {**message, "content": message.get("content") or ""}
        if message["role"] == "developer" and not self.template.reads("developer"):
            result["role"] = "system"
        if calls := message.get("tool_calls"):
            result["tool_calls"] = [_prepared_call(call) for call in calls]
        return result

    def _encoded(self, text: str) -> list[int]:
        # A template writes special tokens itself; ours does not know them.
        return self.tokenizer.encode(
            text, add_special_tokens=not self.template.is_there
        )

    def _check_length(self, text: str) -> None:
        """Refuse a text that is much too long before all of it is encoded.

        Others wait meanwhile: a minute for the longest that a body can hold.

        Raises: ValueError if its beginning alone has twice the context's tokens.
        """
        begin = text[: _CHARACTERS * self._context]
        if len(begin) == len(text):
            return
        count = len(self.tokenizer.encode(begin, add_special_tokens=False))
        if count > 2 * self._context:
            raise ValueError(
                f"prompt is too long: of {len(text):,} characters the first "
                f"{len(begin):,} are {count:,} tokens. This model's maximum context "
                f"length is {self._context:,} tokens on this server"
            )

    def _checked(self, tokens: list[int]) -> list[int]:
        if not tokens:
            raise ValueError("the prompt has no tokens: it needs at least one")
        check_tokens(tokens, self.rows, self.tokenizer)
        return tokens

    def _initial_state(self, chat: "_Chat", text: str, *, answers: bool) -> str:
        """The state of the answer's first token.

        It is reasoning if the template opens that behind the last message, or the
        message that the model goes on with does. What people write does not count.
        """
        given = self.tokenizer.response_initial_state
        if given is not None or not self.template.has_reasoning:
            return given or "normal"
        before = ""
        with suppress(ValueError):
            messages = chat.messages[:-1] if answers else chat.messages
            before = chat.write(messages, generates=False)
        tail = text[_common(text, before) :]
        opened = tail.rfind(self.tokenizer.think_start)
        is_open = opened > tail.rfind(self.tokenizer.think_end)
        return "reasoning" if is_open else "normal"


class _Chat:
    """The messages of one call, and how they are written."""

    def __init__(
        self,
        text: Text,
        messages: list[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        arguments: Mapping[str, Any],
    ) -> None:
        self.messages, self._tools, self._text = messages, tools, text
        self._arguments = dict(arguments)
        if not text.template.is_there:
            self._arguments["chat_template"] = PLAIN_TEMPLATE

    def write(
        self,
        messages: Sequence[Message],
        *,
        answers: bool = False,
        generates: bool = True,
        has_tools: bool = True,
    ) -> str:
        """Write messages; with `answers` the model goes on with the last one."""
        tools = {"tools": self._tools} if self._tools and has_tools else {}
        return rendered(
            messages,
            self._text.tokenizer,
            continue_final_message=answers,
            add_generation_prompt=generates and not answers,
            **tools,
            **self._arguments,
        )

    def check(self, text: str, *, answers: bool) -> None:
        """Raise ValueError if the template leaves a message or the tools out."""
        messages = self.messages
        marks = [f" <<{i}>>" for i in range(len(messages))]
        marked = ""
        with suppress(ValueError):
            marked = self.write(
                [
                    {**m, "content": m["content"] + mark}
                    for m, mark in zip(messages, marks, strict=True)
                ],
                answers=answers,
            )
        for i, (message, mark) in enumerate(zip(messages, marks, strict=True)):
            content, calls = message["content"].strip(), message.get("tool_calls")
            if calls:  # some templates write calls, and not what is said beside them
                names = [call["function"]["name"] for call in calls]
                is_there = all(name in text for name in names)
            else:
                is_there = mark.strip() in marked or (content in text and not marked)
            if not is_there and (content or calls):
                raise ValueError(
                    f"the chat template leaves message {i + 1} ({message['role']}) out"
                )
        if answers:
            check_prefill(text, messages[-1]["content"])
        for tool in self._tools or ():
            if tool["function"]["name"] not in text:
                raise ValueError("the model's chat template cannot tell it of tools")

    def shared_prefixes(self, text: str, *, answers: bool) -> set[int]:
        """Find how much of a prompt other prompts begin with.

        Returns: numbers of characters: up to where the next turn goes on, and up to the
            user's first words where a system prompt or tools stand before them.
        """
        *before, last = self.messages
        if answers:
            answered = [*before, {**last, "content": last["content"] + "§"}]
        else:
            answered = [*self.messages, {"role": "assistant", "content": "§"}]
        roles = ("system", "developer")
        system = [*takewhile(lambda m: m["role"] in roles, self.messages)]
        user = {"role": "user", "content": "§"}
        others = [[*answered, user]]
        if system or self._tools:
            others.append([*system, user])
        result = set()
        for other in others:
            with suppress(ValueError):
                result.add(_common(text, self.write(other)))
        return result


def _prepared_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        with suppress(ValueError):
            arguments = json.loads(arguments)
    if not isinstance(arguments, Mapping):
        raise ValueError(
            f"arguments of the call of {function['name']} are no JSON object: "
            f"{arguments!r:.200}"
        )
    return {**call, "function": {**function, "arguments": arguments}}


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How long the common prefix of two sequences is."""
    lengths = range(1, min(len(one), len(other)) + 1)
    return bisect_left(lengths, True, key=lambda n: one[:n] != other[:n])


def _shown(name: str | bytes) -> str:
    return name if isinstance(name, str) else name.decode(errors="replace")
