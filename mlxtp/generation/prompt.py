"""From messages to the tokens of a prompt."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

# As chat templates take it: a role (system, user, assistant) and what it says.
Message = Mapping[str, Any]


def encode(
    messages: Sequence[Message],
    tokenizer: TokenizerWrapper,
    *,
    ignore_chat_template: bool = False,
    chat_template_config: Mapping[str, Any] | None = None,
    prefill: str | None = None,
    continues: bool = False,
) -> list[int]:
    """Encode messages as the prompt of the next one, in the tokenizer's chat template.

    Without a template the one message is the prompt as it stands.

    Args:
        messages: the conversation so far; the last is the user's.
        tokenizer: mlx-lm's, of the model that answers.
        ignore_chat_template: encode as if the tokenizer had no template.
        chat_template_config: more arguments for the template.
        prefill: the beginning of the answer, which the model goes on with.
        continues: a prompt cache holds all before the last message: encode from there.

    Returns: tokens (L,).

    Raises: ValueError if the messages need a template, if the template raises or leaves
        the last message or the prefill out, or if no tokens come of them.
    """
    is_templated = tokenizer.has_chat_template and not ignore_chat_template
    if is_templated:
        config = chat_template_config or {}
        text = _render(messages, tokenizer, config, prefill, from_last=continues)
    elif len(messages) > 1 or prefill is not None:
        raise ValueError(
            "a system prompt, earlier messages and the beginning of a response need a "
            "chat template: the tokenizer has none, or it is to be ignored"
        )
    else:
        text = messages[0]["content"]
    # A template writes special tokens itself.
    tokens = tokenizer.encode(text, add_special_tokens=not is_templated)
    if not tokens:
        raise ValueError(f"the tokenizer makes no token of the prompt {text!r}")
    return tokens


def _render(
    messages: Sequence[Message],
    tokenizer: TokenizerWrapper,
    config: Mapping[str, Any],
    prefill: str | None,
    *,
    from_last: bool,
) -> str:
    """Write messages, and the beginning of an answer, as the chat template does.

    With `from_last` only what comes from the last message on.

    Raises: ValueError if the template raises, or leaves one of them out.
    """

    def write(last: str) -> str:
        answer = [] if prefill is None else [_message("assistant", prefill)]
        return rendered(
            [*messages[:-1], {**messages[-1], "content": last}, *answer],
            tokenizer,
            continue_final_message=prefill is not None,
            add_generation_prompt=prefill is None,
            **config,
        )

    query = messages[-1]["content"]
    text, marked = write(query), write(f"<query>{query}")
    begin = marked.find("<query>")
    if text == marked or (from_last and begin < 0):
        raise ValueError("the chat template leaves the prompt out")
    if prefill is not None:
        check_prefill(text, prefill)
    return text[begin:] if from_last else text


def rendered(
    messages: Sequence[Message], tokenizer: TokenizerWrapper, **arguments: Any
) -> str:
    """Write messages as the chat template does, with arguments for it.

    Templates of tokenizers run in jinja2's sandbox.

    Raises: ValueError, in the template's words, if it raises.
    """
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **arguments)
    except Exception as error:  # templates are programs, and raise what they like
        said = textwrap.shorten(str(error), 200)
        raise ValueError(
            f"the chat template raises {type(error).__name__}: {said}"
        ) from error


def check_prefill(text: str, prefill: str) -> None:
    """Raise ValueError if a prompt does not end with the beginning of the response."""
    if not text.rstrip().endswith(prefill.strip()):
        raise ValueError("the chat template leaves the beginning of the response out")


def tokens_of(
    prompt: str | mx.array | Sequence[int], tokenizer: TokenizerWrapper
) -> list[int]:
    """The tokens of a prompt, with the special ones that mlx-lm puts before a text."""
    if isinstance(prompt, mx.array):
        return prompt.tolist()  # type: ignore[return-value]
    if not isinstance(prompt, str):
        return list(prompt)
    begin = tokenizer.bos_token
    return tokenizer.encode(
        prompt, add_special_tokens=begin is None or not prompt.startswith(begin)
    )


def check_tokens(tokens: Sequence[int], rows: int, tokenizer: TokenizerWrapper) -> None:
    """Compare tokens with the rows of the embedding that they are looked up in.

    Raises: ValueError that names the first token without a row.
    """
    beyond = next((token for token in tokens if not 0 <= token < rows), None)
    if beyond is None:
        return
    vocabulary = tokenizer.get_vocab()
    text = next((repr(t) for t, n in vocabulary.items() if n == beyond), "no text")
    raise ValueError(
        f"token {beyond} of the prompt ({text}) is none of the model's: its embedding "
        f"has {rows} rows, for tokens from 0 to {rows - 1}; leave it out"
    )


def messages_of(prompt: str, system: str | None = None) -> list[Message]:
    """Make a conversation of one prompt, behind a system prompt if there is one."""
    before = [] if system is None else [_message("system", system)]
    return [*before, _message("user", prompt)]


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
