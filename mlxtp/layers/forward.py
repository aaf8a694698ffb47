"""The one way in which a forward pass of mlx-lm is changed."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn

from mlxtp.comm.communicator import Communicator

# Takes the method as it was, the module, and the arguments of the call.
Forward = Callable[..., Any]


def change_forward(
    module: nn.Module, forward: Forward, method: str = "__call__"
) -> None:
    """Let `forward(former, module, *args)` stand for a method of one module.

    `former` is the method as it was, which takes the module first. The module keeps
    its place, its attributes and its type, of which it gets a subclass of its own:
    Python looks `__call__` up there. `forward` itself holds whatever else it needs.
    """
    kind = type(module)
    former = getattr(kind, method)

    @functools.wraps(former)  # mlx-lm looks at the signature of a model
    def changed(self: nn.Module, *args: Any, **options: Any) -> Any:
        return forward(former, self, *args, **options)

    body = {method: changed, "__module__": kind.__module__}
    module.__class__ = type(kind.__name__, (kind,), body)


@dataclass(frozen=True)
class RaisingTogether:
    """The forward pass of a whole model: what it raises, it raises on all ranks.

    Research code may catch the exception; then no rank waits for another.
    """

    comm: Communicator

    def __call__(
        self, former: Forward, model: nn.Module, *args: Any, **options: Any
    ) -> Any:
        """Call the model."""
        with self.comm.raising_together():
            return former(model, *args, **options)


def twin(module: nn.Module, **children: Any) -> nn.Module:
    """Make a module with the attributes of `module`, some of them others.

    Both have the same children and parameters, none is copied. A twin lives as long as
    a call: so what the call alone needs is not left on the model.
    """
    kind: Any = type(module)
    other = kind.__new__(kind)
    dict.update(other, module)
    vars(other).update(vars(module))
    for name, value in children.items():
        setattr(other, name, value)
    return other
