"""Messages become the tokens that mlx-lm's own program makes of them."""

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer
from tiny import save_tokenizer

from mlxtp.generation.prompt import encode, messages_of

pytestmark = pytest.mark.once

TEMPLATE = """\
{% for m in messages %}[{{ m.role[0] }}:{{ m.content }}\
{% if not (loop.last and continue_final_message) %}]{% endif %}{% endfor %}\
{% if add_generation_prompt %}[a:{% endif %}{{ ending }}"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TokenizerWrapper:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    result = load_tokenizer(folder, {"chat_template": TEMPLATE})
    assert result.has_chat_template
    return result


def text(tokens: list[int]) -> str:
    """What tokens stand for: one character each."""
    return "".join(chr(33 + token) for token in tokens)


def test_without_a_template(tokenizer: TokenizerWrapper) -> None:
    tokens = encode(messages_of("abc"), tokenizer, ignore_chat_template=True)
    assert text(tokens) == "abc"
    for messages, prefill in [(messages_of("a", "b"), None), (messages_of("a"), "b")]:
        with pytest.raises(ValueError, match="need a chat template"):
            encode(messages, tokenizer, ignore_chat_template=True, prefill=prefill)
    with pytest.raises(ValueError, match="makes no token of the prompt ''"):
        encode(messages_of(""), tokenizer, ignore_chat_template=True)


def test_in_the_template(tokenizer: TokenizerWrapper) -> None:
    assert text(encode(messages_of("abc"), tokenizer)) == "[u:abc][a:"
    messages = messages_of("abc", "be")
    assert text(encode(messages, tokenizer)) == "[s:be][u:abc][a:"
    assert text(encode(messages, tokenizer, prefill="so")) == "[s:be][u:abc][a:so"
    config = {"ending": "!"}
    tokens = encode(messages, tokenizer, chat_template_config=config)
    assert text(tokens) == "[s:be][u:abc][a:!"


def test_behind_a_prompt_cache(tokenizer: TokenizerWrapper) -> None:
    """Only what the cache does not hold: the last message and what comes behind."""
    messages = [
        *messages_of("abc", "be"),
        {"role": "assistant", "content": "so"},
        *messages_of("def"),
    ]
    assert text(encode(messages, tokenizer, continues=True)) == "def][a:"
    tokens = encode(messages, tokenizer, continues=True, prefill="so")
    assert text(tokens) == "def][a:so"
