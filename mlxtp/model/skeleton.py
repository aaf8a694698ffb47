"""mlx-lm's model, built as mlx-lm builds it, without reading a weight."""

import contextlib
import dataclasses
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm import utils as mlx_lm_utils
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlxtp.checkpoint.cut import open_checkpoint
from mlxtp.checkpoint.headers import Checkpoint
from mlxtp.checkpoint.tensors import Tensor
from mlxtp.model.sources import Computed, Source, trace


@dataclasses.dataclass(frozen=True)
class EmptyModel:
    """A model that holds no weights, and where each parameter is to be read."""

    model: nn.Module
    config: dict[str, Any]
    sources: dict[str, Source]


def build(
    folder: Path, adapter: Path | None = None, *, trust_remote_code: bool = False
) -> EmptyModel:
    """Build the model in `folder`, with the LoRA layers of `adapter` if there is one.

    Reads the config and the headers of the safetensors files.

    Raises: ValueError, with what is wrong and where, for what does not make a
        model of mlx-lm, and for parameters that are missing, unexpected or of
        another shape than the model's.
    """
    given = read_json(folder / "config.json", needed=["model_type"])
    if trust_remote_code and "model_file" in given:
        raise ValueError(
            f"{folder} brings an architecture of its own ({given['model_file']}): "
            "mlxtp does not know how to split it"
        )
    tensors = open_checkpoint(folder)
    # mlx-lm gets arrays that read themselves when they are evaluated, which nobody
    # does: their identity tells which parameter comes from where.
    promises = _unread(tensors)
    answers = _Answers(promises)
    try:
        model, config = mlx_lm_utils.load_model(
            folder,
            lazy=True,
            strict=False,  # what is wrong with the weights we say ourselves
            get_model_classes=answers.classes,
            trust_remote_code=trust_remote_code,
        )
    except Exception as error:  # all that mlx-lm may stumble over in a config
        reason = str(error) if isinstance(error, ValueError) else repr(error)
        raise ValueError(
            f"mlx-lm cannot build the model in {folder}: {reason}"
        ) from error
    del model.sanitize, model.load_weights  # they hold on to what is computed
    weights = answers.weights
    _check_parameters(model, {name: w.shape for name, w in weights.items()}, folder)
    model.update(tree_unflatten(list(weights.items())))
    if adapter is not None:
        added = _add_adapter(model, adapter)
        _check_shapes(model, {name: t.shape for name, t in added.items()}, adapter)
        adapted = _unread(added)
        model.update(tree_unflatten(list(adapted.items())))
        # Ends of names may be the checkpoint's, too: what is meant is the array.
        tensors |= {f"adapter {name}": tensor for name, tensor in added.items()}
        promises |= {f"adapter {name}": array for name, array in adapted.items()}
    parameters = dict(tree_flatten(model.parameters()))
    return EmptyModel(model, config, _sources(parameters, promises, tensors, answers))


def _unread(tensors: Mapping[str, Tensor]) -> dict[str, mx.array]:
    """Arrays that are read when they are evaluated."""
    files = {piece.file for t in tensors.values() if t.is_whole for piece in t.pieces}
    loaded: dict[Path, Any] = {file: mx.load(str(file)) for file in sorted(files)}
    return {
        name: loaded[tensor.pieces[0].file][name]
        if tensor.is_whole
        else mx.zeros(tensor.shape, tensor.dtype)
        for name, tensor in tensors.items()
    }


def _sources(
    parameters: Mapping[str, mx.array],
    promises: Mapping[str, mx.array],
    tensors: Mapping[str, Tensor],
    answers: "_Answers",
) -> dict[str, Source]:
    """Where each parameter comes from: a tensor, or what mlx-lm computes of some."""
    origins = {id(promise): tensors[name] for name, promise in promises.items()}
    sources: dict[str, Source] = {
        name: origins[id(parameter)]
        for name, parameter in parameters.items()
        if id(parameter) in origins
    }
    # By the names that they have after mlx-lm's renaming.
    names = {id(array): name for name, array in answers.sanitized.items()}
    computed = {
        name: names[id(parameter)]
        for name, parameter in parameters.items()
        if name not in sources and id(parameter) in names
    }
    if computed:
        given = {
            name: mx.zeros(tensor.shape, tensor.dtype)
            for name, tensor in tensors.items()
            if name in answers.given
        }
        wanted = sorted(set(computed.values()))
        traced = trace(answers.sanitize_anew, given, tensors, wanted)
        sources |= {
            name: traced[inner] for name, inner in computed.items() if inner in traced
        }
    return sources | {
        name: Computed(parameter)
        for name, parameter in parameters.items()
        if name not in sources
    }


class _Answers:
    """A hook for `load_model`: models that take `given` for the checkpoint.

    `sanitized` is what mlx-lm makes of it, `weights` what it would load into the model.
    """

    def __init__(self, given: Mapping[str, mx.array]) -> None:
        self.given = given
        self.sanitized: dict[str, mx.array] = {}
        self.weights: dict[str, mx.array] = {}
        self._make: Callable[[], nn.Module] | None = None

    def classes(
        self, config: dict[str, Any]
    ) -> tuple[Callable[[Any], nn.Module], type]:
        """mlx-lm's classes, whose instances answer so."""
        model_class, args_class = _imported(config)
        missing = [
            field.name
            for field in dataclasses.fields(args_class)
            if field.name not in config
            and field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}")

        def instance(args: Any) -> nn.Module:
            self._make = lambda: model_class(args)
            model = model_class(args)
            sanitize = getattr(model, "sanitize", dict)

            def sanitize_given(_: Any) -> dict[str, mx.array]:
                self.sanitized = sanitize(dict(self.given))
                return self.sanitized

            model.sanitize = sanitize_given
            model.load_weights = lambda pairs, strict: self.weights.update(pairs)
            return model

        return instance, args_class

    def sanitize_anew(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """What mlx-lm makes of other `weights`, by a model that has seen none yet."""
        assert self._make is not None
        return self._make().sanitize(weights)


def unloaded(config: dict[str, Any]) -> nn.Module:
    """The model of a config as mlx-lm makes it, before any weights."""
    model_class, args_class = _imported(config)
    return model_class(args_class.from_dict(config))  # type: ignore[attr-defined]


def _imported(config: dict[str, Any]) -> tuple[type, type]:
    """mlx-lm's classes for a config; some modules exit where a package is missing."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            return mlx_lm_utils._get_classes(config)
    except (SystemExit, ImportError) as error:
        hint = said.getvalue().strip() or str(error)
        raise ValueError(
            f"mlx-lm cannot import the model type {config['model_type']!r}: {hint}"
        ) from error


def _check_parameters(
    model: nn.Module, shapes: Mapping[str, tuple[int, ...]], folder: Path
) -> None:
    expected = dict(tree_flatten(model.parameters()))
    if missing := sorted(expected.keys() - shapes.keys()):
        raise ValueError(f"the checkpoint in {folder} lacks {_some(missing)}")
    if extra := sorted(shapes.keys() - expected.keys()):
        raise ValueError(
            f"the checkpoint in {folder} has {_some(extra)}, which its model has not"
        )
    _check_shapes(model, shapes, folder)


def _check_shapes(
    model: nn.Module, shapes: Mapping[str, tuple[int, ...]], folder: Path
) -> None:
    expected = dict(tree_flatten(model.parameters()))
    for name, shape in shapes.items():
        if shape != expected[name].shape:
            raise ValueError(
                f"{name} in {folder} has the shape {shape}; the model's is "
                f"{expected[name].shape}"
            )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _add_adapter(model: nn.Module, adapter: Path) -> dict[str, Tensor]:
    """Put the LoRA layers of `adapter` into `model`; their tensors, by parameter."""
    config = read_json(adapter / "adapter_config.json")
    kind = config.get("fine_tune_type", "lora")
    if kind != "full":
        try:
            linear_to_lora_layers(
                model,
                config["num_layers"],
                config["lora_parameters"],
                use_dora=kind == "dora",
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{adapter / 'adapter_config.json'} describes no adapter of this "
                f"model: {error!r}"
            ) from error
        model.eval()
    tensors = Checkpoint([adapter / "adapters.safetensors"]).tensors
    expected = dict(tree_flatten(model.parameters()))
    if extra := sorted(tensors.keys() - expected.keys()):
        raise ValueError(f"{adapter} has {_some(extra)}, which its model has not")
    return tensors


def read_json(file: Path, needed: list[str] | None = None) -> dict[str, Any]:
    """Read a JSON object that has the keys `needed`.

    Raises: ValueError that says what is wrong.
    """
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        raise ValueError(f"there is no {file.name} in {file.parent}") from None
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object")
    for key in needed or []:
        if key not in content:
            raise ValueError(f"{file} lacks {key}")
    return content
