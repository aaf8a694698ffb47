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

from mlxtp.checkpoint.cut import open_checkpoint
from mlxtp.checkpoint.headers import Checkpoint
from mlxtp.checkpoint.tensors import ReadTensor, Tensor
from mlxtp.model.sources import Computed, Source, trace
from mlxtp.partition.spans import Slice

# mlx-lm imports transformers, which takes seconds: it comes when a model is built.


@dataclasses.dataclass(frozen=True)
class EmptyModel:
    """A model that holds no weights, and where each parameter is to be read.

    `sources` name tensors; `checkpoint` says where these lie, an adapter's included.
    """

    model: nn.Module
    config: dict[str, Any]
    sources: dict[str, Source]
    checkpoint: Checkpoint

    def read(
        self, name: str, part: Slice, read_tensor: ReadTensor | None = None
    ) -> mx.array:
        """Read a slice of the parameter `name`. Errors as in `Source.read`."""
        return self.sources[name].read(part, read_tensor or self.checkpoint.read)

    def bytes_of(self, slices: Mapping[str, Slice]) -> int:
        """Bytes of slices of parameters."""
        return sum(
            part.size * self.sources[name].dtype.size for name, part in slices.items()
        )


def build(
    folder: Path,
    adapter: Path | None = None,
    *,
    checkpoint: Checkpoint | None = None,
    name: str | None = None,
    model_config: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> EmptyModel:
    """Build the model in `folder`, with the LoRA layers of `adapter` if there is one.

    Reads the config and the headers of the safetensors files.

    Args:
        folder: where config and weights lie.
        adapter: a folder with LoRA adapters or full weights of mlx-lm's tuner.
        checkpoint: the folder's, where it is open already.
        name: what errors call the model. Default: the folder.
        model_config: what replaces entries of config.json.
        trust_remote_code: run Python code that the checkpoint carries.

    Raises: ValueError, with what is wrong and where, for what does not make a
        model of mlx-lm, and for parameters that are missing, unexpected or of
        another shape than the model's.
    """
    from mlx_lm.utils import load_model

    name = name or str(folder)
    given = read_json(folder / "config.json", needed=["model_type"])
    if trust_remote_code and "model_file" in given:
        raise ValueError(
            f"{name} brings an architecture of its own ({given['model_file']}): "
            "mlxtp does not know how to split it"
        )
    checkpoint = checkpoint or open_checkpoint(folder)
    # mlx-lm gets arrays that read themselves when they are evaluated, which nobody
    # does: their identity tells which parameter comes from which tensor.
    unread = _unread(checkpoint)
    hook = _LoadHook(unread)
    try:
        model, config = load_model(
            folder,
            lazy=True,
            strict=False,  # what is wrong with the weights we say ourselves
            model_config=model_config,
            get_model_classes=hook.classes,
            trust_remote_code=trust_remote_code,
        )
    except Exception as error:  # all that mlx-lm may stumble over in a config
        reason = str(error) if isinstance(error, ValueError) else repr(error)
        raise ValueError(
            f"mlx-lm cannot build the model in {name}: {reason}"
        ) from error
    del model.sanitize, model.load_weights  # they hold on to what is computed
    _check_parameters(model, hook.weights, name)
    model.update(tree_unflatten(list(hook.weights.items())))
    tensors = _by_identity(unread, checkpoint)
    if adapter is not None:
        added = _add_adapter(model, adapter)
        adapted = _unread(added)
        _check_shapes(model, adapted, str(adapter))
        model.update(tree_unflatten(list(adapted.items())))
        # The checkpoint may have tensors of the same names.
        added = added.renamed("adapter {}")
        adapted = {f"adapter {name}": array for name, array in adapted.items()}
        tensors |= _by_identity(adapted, added)
        checkpoint = checkpoint.updated(added)
    parameters = dict(tree_flatten(model.parameters()))
    sources = _sources(parameters, tensors, hook)
    return EmptyModel(model, config, sources, checkpoint)


def _unread(checkpoint: Checkpoint) -> dict[str, mx.array]:
    """Arrays that are read when they are evaluated; zeros for what lies in pieces."""
    stored = checkpoint.tensors
    files = {s.pieces[0].file for s in stored.values() if s.is_whole}
    loaded: dict[Path, Any] = {file: mx.load(str(file)) for file in sorted(files)}
    return {
        name: loaded[s.pieces[0].file][name]
        if s.is_whole
        else mx.zeros(s.tensor.shape, s.tensor.dtype)
        for name, s in stored.items()
    }


def _by_identity(
    unread: Mapping[str, mx.array], checkpoint: Checkpoint
) -> dict[int, Tensor]:
    """The tensors that unread arrays stand for."""
    return {id(a): checkpoint.tensors[name].tensor for name, a in unread.items()}


def _sources(
    parameters: Mapping[str, mx.array],
    tensors: Mapping[int, Tensor],
    hook: "_LoadHook",
) -> dict[str, Source]:
    """Where each parameter comes from: a tensor, or what mlx-lm computes of some.

    `tensors` are those that unread arrays stand for, by the identity of the array.
    """
    sources: dict[str, Source] = {
        name: tensors[id(parameter)]
        for name, parameter in parameters.items()
        if id(parameter) in tensors
    }
    # By the names that they have after mlx-lm's renaming.
    names = {id(array): name for name, array in hook.sanitized.items()}
    computed = {
        name: names[id(parameter)]
        for name, parameter in parameters.items()
        if name not in sources and id(parameter) in names
    }
    if computed:
        given = {name: tensors[id(array)] for name, array in hook.unread.items()}
        traced = trace(hook.sanitize_again, given, sorted(set(computed.values())))
        sources |= {
            name: traced[inner] for name, inner in computed.items() if inner in traced
        }
    return sources | {
        name: Computed(parameter)
        for name, parameter in parameters.items()
        if name not in sources
    }


class _LoadHook:
    """Stands between mlx-lm's `load_model` and its models, and sees what passes.

    Its models take the arrays `unread` for the checkpoint. `sanitized` is what mlx-lm
    makes of them, `weights` is what it would load into the model.
    """

    def __init__(self, unread: Mapping[str, mx.array]) -> None:
        self.unread = unread
        self.sanitized: dict[str, mx.array] = {}
        self.weights: dict[str, mx.array] = {}
        self._make: Callable[[], nn.Module] | None = None

    def classes(
        self, config: dict[str, Any]
    ) -> tuple[Callable[[Any], nn.Module], type]:
        """Give `load_model` the classes of a config: a model's maker, its arguments'.

        Raises: ValueError if the config lacks what mlx-lm has no default for.
        """
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

        def hooked(args: Any) -> nn.Module:
            self._make = lambda: model_class(args)
            model = model_class(args)
            sanitize = getattr(model, "sanitize", dict)

            def sanitize_unread(_: Any) -> dict[str, mx.array]:
                self.sanitized = sanitize(dict(self.unread))
                return self.sanitized

            model.sanitize = sanitize_unread
            model.load_weights = lambda pairs, strict: self.weights.update(pairs)
            return model

        return hooked, args_class

    def sanitize_again(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Let mlx-lm sanitize other `weights`, by a model that has seen none yet."""
        assert self._make is not None
        return self._make().sanitize(weights)


def unloaded(config: dict[str, Any]) -> nn.Module:
    """Make the model of a config as mlx-lm makes it, before any weights.

    Raises: ValueError if mlx-lm cannot import its type; what it raises for others.
    """
    model_class, args_class = _imported(config)
    return model_class(args_class.from_dict(config))  # type: ignore[attr-defined]


def _imported(config: dict[str, Any]) -> tuple[type, type]:
    """mlx-lm's classes for a config; some modules exit where a package is missing."""
    from mlx_lm.utils import _get_classes  # has no public name

    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            return _get_classes(config)
    except (SystemExit, ImportError) as error:
        hint = printed.getvalue().strip() or str(error)
        raise ValueError(
            f"mlx-lm cannot import the model type {config['model_type']!r}: {hint}"
        ) from error


def _check_parameters(
    model: nn.Module, weights: Mapping[str, mx.array], name: str
) -> None:
    """Compare the names and shapes of weights with the model's parameters."""
    expected = dict(tree_flatten(model.parameters()))
    if missing := sorted(expected.keys() - weights.keys()):
        raise ValueError(f"the checkpoint in {name} lacks {_some(missing)}")
    if extra := sorted(weights.keys() - expected.keys()):
        raise ValueError(
            f"the checkpoint in {name} has {_some(extra)}, which the model does not "
            "have"
        )
    _check_shapes(model, weights, name)


def _check_shapes(model: nn.Module, weights: Mapping[str, mx.array], name: str) -> None:
    expected = dict(tree_flatten(model.parameters()))
    for parameter, array in weights.items():
        if array.shape != expected[parameter].shape:
            raise ValueError(
                f"{parameter} in {name} has the shape {array.shape}; the model's is "
                f"{expected[parameter].shape}"
            )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _add_adapter(model: nn.Module, adapter: Path) -> Checkpoint:
    """Put the LoRA layers of `adapter` into `model`; its tensors are named by them."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    _check_is_adapter(adapter)
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
        except Exception as error:  # all that mlx-lm may stumble over in a config
            raise ValueError(
                f"{adapter / 'adapter_config.json'} describes no adapter of this "
                f"model: {error!r}"
            ) from error
        model.eval()
    added = Checkpoint.of_files([adapter / "adapters.safetensors"])
    expected = dict(tree_flatten(model.parameters()))
    if extra := sorted(added.tensors.keys() - expected.keys()):
        raise ValueError(f"{adapter} has {_some(extra)}, which the model does not have")
    return added


def _check_is_adapter(folder: Path) -> None:
    """Raise ValueError for a folder that is no adapter of mlx-lm's tuner."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder with an adapter {folder}")
    config = folder / "adapter_config.json"
    if config.exists() and "peft_type" in read_json(config):
        raise ValueError(
            f"{folder} is an adapter of PEFT, and mlxtp reads those of mlx_lm.lora: "
            "merge it into its model with PEFT, then convert that with mlx_lm.convert"
        )
    if (folder / "config.json").exists() and not config.exists():
        raise ValueError(
            f"{folder} is a model and no adapter: there is no {config.name} in it"
        )


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
