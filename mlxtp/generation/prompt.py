"""From messages to the tokens of a prompt."""

from collections.abc import Mapping, Sequence
from typing import Any

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

    Raises: ValueError if the messages need a template, or no tokens come of them.
    """
    is_templated = tokenizer.has_chat_template and not ignore_chat_template
    if is_templated:

        def render(messages: Sequence[Message]) -> str:
            answer = [] if prefill is None else [_message("assistant", prefill)]
            return tokenizer.apply_chat_template(
                [*messages, *answer],
                tokenize=False,
                continue_final_message=prefill is not None,
                add_generation_prompt=prefill is None,
                **(chat_template_config or {}),
            )

        text = render(messages)
        if continues:
            marked = render([*messages[:-1], _message("user", "<query>")])
            text = text[marked.index("<query>") :]
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


def messages_of(prompt: str, system: str | None = None) -> list[Message]:
    """Make a conversation of one prompt, behind a system prompt if there is one."""
    before = [] if system is None else [_message("system", system)]
    return [*before, _message("user", prompt)]


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
