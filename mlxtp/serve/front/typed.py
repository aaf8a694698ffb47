"""Objects of a body whose `type` says by which model they are read."""

from collections.abc import Mapping
from typing import Any, TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from mlxtp.serve.front.errors import Refusal
from mlxtp.serve.front.fields import Fields

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
