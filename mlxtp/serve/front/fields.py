"""The fields of a body: which are honoured, which change no answer, which are refused.

A field that a client gives is never dropped in silence: it is a field of a `Fields`
class, or it stands in `WITHOUT_EFFECT`, or the request is refused with its name.
"""

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
)

from mlxtp.serve.front.errors import Refusal

# Fields that change no answer, in whatever object of a body, and what they are for.
WITHOUT_EFFECT = {
    "allowed_callers": "who but the model may call a function",
    "annotations": "sources that an earlier answer named",
    "cache_control": "where a cache may begin: the prefix cache needs no hint",
    "caller": "who called a function",
    "citations": "sources that an earlier answer named",
    "client_metadata": "the client's own notes",
    "defer_loading": "show a function only when it is searched for: it is shown",
    "eager_input_streaming": "how arguments are streamed",
    "encrypted_content": "reasoning that OpenAI alone can read",
    "id": "of an item that was given back",
    "include_obfuscation": "padding of a stream's events",
    "inference_geo": "where the model may run",
    "max_tool_calls": "calls of tools that OpenAI runs",
    "metadata": "the client's own notes",
    "output_schema": "what a function answers",
    "phase": "of a message that was given back",
    "prediction": "text that the answer may repeat, so that it comes faster",
    "prompt_cache_breakpoint": "where a cache may begin",
    "prompt_cache_key": "which cache to ask",
    "prompt_cache_options": "how long a cache is kept",
    "prompt_cache_retention": "how long a cache is kept",
    "safety_identifier": "who the client's user is",
    "service_tier": "how much a request may cost",
    "signature": "of thinking that was given back",
    "status": "of an item that was given back",
    "store": "keep the answer at OpenAI's",
    "user": "who the client's user is",
}


class Fields(BaseModel):
    """An object of a body. Types are strict: "1" is no number."""

    model_config = ConfigDict(extra="allow", strict=True)

    def check_names(self, path: str = "") -> None:
        """Refuse the first field that is neither known nor without effect.

        null asks for nothing, and is taken everywhere.

        Raises: Refusal (400), with the field's name.
        """
        for name, value in (self.model_extra or {}).items():
            if name not in WITHOUT_EFFECT and value is not None:
                param = f"{path}{name}"
                raise Refusal(
                    400,
                    f"{param} is not supported by this server",
                    param=param,
                    code="unsupported",
                )
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Fields):
                value.check_names(f"{path}{name}.")
            elif isinstance(value, list):
                for index, entry in enumerate(value):
                    if isinstance(entry, Fields):
                        entry.check_names(f"{path}{name}.{index}.")


M = TypeVar("M", bound=Fields)


def typed(
    models: Mapping[str, type[M]], value: Any, where: str, default: str | None = None
) -> M:
    """Read a value as the model that its `type` names, or `default` where it has none.

    Raises: Refusal (400) for a type that is not among the models, and for a field that
        would be dropped; RequestValidationError for what the model says against the
        value. All name the place.
    """
    kind = (value.get("type") or default) if isinstance(value, dict) else None
    model = models.get(kind) if isinstance(kind, str) else None
    if model is None:
        raise Refusal(
            400,
            f"{where}.type: this server takes {', '.join(models)}; given: {kind!r}",
            param=f"{where}.type",
            code="unsupported",
        )
    try:
        read = model.model_validate(value)
    except ValidationError as error:
        place = ("body", *where.split("."))
        raise RequestValidationError(
            [{**mistake, "loc": place + mistake["loc"]} for mistake in error.errors()]
        ) from None
    read.check_names(f"{where}.")
    return read


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Stops = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=1000)]],
    Field(max_length=16),
    BeforeValidator(_listed, json_schema_input_type=str | list[str] | None),
]


class StreamOptions(Fields):
    """What a stream tells besides."""

    include_usage: bool | None = None


class Sampling(Fields):
    """Fields of both kinds of completions, in OpenAI's names and in mlx-lm's.

    None is a field that was not given.
    """

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(default=None, ge=1, le=128)
    stop: Stops | None = None
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 64)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, lt=1 << 31)
    min_p: float | None = Field(default=None, ge=0, le=1)
    xtc_probability: float | None = Field(default=None, ge=0, le=1)
    xtc_threshold: float | None = Field(default=None, ge=0, le=0.5)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=10)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    ignore_eos: bool | None = None

    def given(self) -> dict[str, Any]:
        """Give the settings that the client gave, in `Settings`' names.

        Raises: Refusal (400) for what no type says.
        """
        if self.stream_options is not None and not self.stream:
            raise Refusal(
                400, "stream_options need stream: true", param="stream_options"
            )
        given: dict[str, Any] = {
            name: getattr(self, name)
            for name in (
                "temperature",
                "top_p",
                "min_p",
                "xtc_probability",
                "xtc_threshold",
                "repetition_penalty",
                "presence_penalty",
                "frequency_penalty",
                "ignore_eos",
            )
        }
        if self.seed is not None:
            given["seed"] = self.seed % (1 << 63)
        if self.top_k is not None:
            given["top_k"] = max(self.top_k, 0)
        if self.logit_bias is not None:
            try:
                given["logit_bias"] = {int(t): x for t, x in self.logit_bias.items()}
            except ValueError as error:
                raise Refusal(
                    400,
                    "logit_bias is an object from tokens, such as 42, to numbers",
                    param="logit_bias",
                ) from error
        return given

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        options = self.stream_options
        return options is not None and bool(options.include_usage)
