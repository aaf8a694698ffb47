"""The tokenizer of a checkpoint, as mlx-lm loads it."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

# mlx-lm imports transformers, which takes seconds: it comes when a model is loaded.
if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper


def load_tokenizer(
    folder: Path,
    name: str,
    tokenizer_config: dict[str, Any] | None,
    config: dict[str, Any],
    trust_remote_code: bool,
) -> "TokenizerWrapper":
    """Load it from a folder, with more arguments and the model's ends of text.

    `name` is what errors call the checkpoint, `config` the model's.

    Raises: ValueError if it does not load.
    """
    from mlx_lm.utils import load_tokenizer
    from transformers import logging as of_transformers

    extra = {**(tokenizer_config or {}), "trust_remote_code": trust_remote_code}
    verbosity = of_transformers.get_verbosity()
    # It warns of model types that it does not know, which mlx-lm may.
    of_transformers.set_verbosity(logging.ERROR)
    try:
        return load_tokenizer(folder, extra, eos_token_ids=config.get("eos_token_id"))
    except Exception as error:  # all that transformers may stumble over in files
        raise ValueError(f"the tokenizer in {name} does not load: {error!r}") from error
    finally:
        of_transformers.set_verbosity(verbosity)
