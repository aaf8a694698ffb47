"""`GET /v1/models`, and `POST /tokenize` and `/detokenize` as vLLM has them."""

import time
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field

from mlxtp.serve.front.config import Config, TheConfig, TheRanks
from mlxtp.serve.front.conversation import (
    Conversation,
    checked_model,
    encode,
    model_names,
    ready_ranks,
)
from mlxtp.serve.front.errors import Refusal
from mlxtp.serve.front.fields import Fields
from mlxtp.serve.front.openai_chat import ChatCompletion, Message, Tool
from mlxtp.serve.front.ranks import Ranks

router = APIRouter()

CREATED = int(time.time())  # when the front started

# What goes with a prompt alone, and with a conversation alone.
OF_PROMPT = ("add_special_tokens",)
OF_MESSAGES = (
    "tools",
    "chat_template_kwargs",
    "add_generation_prompt",
    "continue_final_message",
)


class Tokenize(Fields):
    """The body of `POST /tokenize`: a prompt, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    messages: list[Message] | None = None
    tools: list[Tool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    def conversation(self) -> Conversation | None:
        """Give the conversation that is to be encoded; None where it is a prompt.

        Raises: Refusal (400) where it is neither or both, or has a field that does not
            go with it.
        """
        self.check_names()
        if (self.prompt is None) == (self.messages is None):
            raise Refusal(400, "either prompt or messages is wanted", param="prompt")
        given = "prompt" if self.messages is None else "messages"
        for name in OF_MESSAGES if given == "prompt" else OF_PROMPT:
            if getattr(self, name) is not None:
                raise Refusal(400, f"{name} does not go with {given}", param=name)
        if self.messages is None:
            return None
        return ChatCompletion(
            messages=self.messages,
            tools=self.tools,
            chat_template_kwargs=self.chat_template_kwargs,
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=self.continue_final_message,
        ).conversation()


class Detokenize(Fields):
    """The body of `POST /detokenize`."""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]]


@router.get("/v1/models")
async def models(ranks: TheRanks, config: TheConfig) -> dict[str, Any]:
    """List the names of the model, in OpenAI's and in Anthropic's form at once."""
    listed = [_model(ranks, config, name) for name in model_names(ranks, config)]
    return {
        "object": "list",
        "data": listed,
        "first_id": listed[0]["id"],
        "last_id": listed[-1]["id"],
        "has_more": False,
    }


@router.get("/v1/models/{name:path}")
async def model(name: str, ranks: TheRanks, config: TheConfig) -> dict[str, Any]:
    """Describe the model under one of its names."""
    return _model(ranks, config, checked_model(ranks, config, name))


def _model(ranks: Ranks, config: Config, name: str) -> dict[str, Any]:
    ready = ranks.ready
    return {
        "id": name,
        "object": "model",
        "created": CREATED,
        "owned_by": "mlxtp",
        "root": ready.model if ready is not None else config.model_names[0],
        "parent": None,
        "max_model_len": ready.context if ready is not None else None,
        "type": "model",
        "display_name": name,
        "created_at": datetime.fromtimestamp(CREATED, UTC).isoformat(),
    }


@router.post("/tokenize")
async def tokenize(
    body: Tokenize, ranks: TheRanks, config: TheConfig
) -> dict[str, Any]:
    """Encode a prompt or a conversation."""
    checked_model(ranks, config, body.model)
    ready = ready_ranks(ranks)
    conversation = body.conversation()
    strings = None
    if conversation is not None:
        tokens = (await encode(ranks, conversation)).tokens
        if body.return_token_strs:
            strings = (await ranks.call("decode_each", tokens=tokens))["texts"]
    else:
        result = await ranks.call(
            "tokenize",
            text=body.prompt,
            add_special_tokens=body.add_special_tokens is not False,
        )
        tokens = result["tokens"]
        if body.return_token_strs:
            strings = result["strings"]
    return {
        "count": len(tokens),
        "max_model_len": ready.context,
        "tokens": tokens,
        "token_strs": strings,
    }


@router.post("/detokenize")
async def detokenize(
    body: Detokenize, ranks: TheRanks, config: TheConfig
) -> dict[str, Any]:
    """Decode tokens."""
    body.check_names()
    checked_model(ranks, config, body.model)
    ready_ranks(ranks)
    result = await ranks.call("detokenize", tokens=body.tokens)
    return {"prompt": result["text"]}
