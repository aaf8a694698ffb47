"""mlx-lm's model, built as mlx-lm builds it, without reading a weight."""

import contextlib
import dataclasses
import io
import json
import re
from collections.abc import Iterator, Mapping, Set
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlxtp.checkpoint.cut import open_checkpoint
from mlxtp.checkpoint.headers import (
    Checkpoint,
    absent_files,
    index_of,
    unlisted,
    unsettled,
)
from mlxtp.checkpoint.tensors import Tensor
from mlxtp.model.sources import Computed, Source, trace, uncuttable
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

    def settle(self, slices: Mapping[str, Slice]) -> None:
        """Have what cannot be cut as `slices` are computed whole, on every rank alike.

        `slices` are those of any rank.
        """
        self.sources.update(uncuttable(self.sources, slices))

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
    name = name or str(folder)
    given = read_json(folder / "config.json", needed=["model_type"])
    if trust_remote_code and "model_file" in given:
        raise ValueError(
            f"{name} brings an architecture of its own ({given['model_file']}): "
            "mlxtp does not know how to split it"
        )
    checkpoint = checkpoint or open_checkpoint(folder)
    loader = _Loader(folder, model_config, _unread(checkpoint))
    index = index_of(folder)
    try:
        model, config, weights = loader.load({})
    except Exception as error:  # all that mlx-lm may stumble over in a config
        if isinstance(error, KeyError) and (
            files := absent_files(error.args, checkpoint.headers, index.files)
        ):
            raise ValueError(_lacks(name, list(error.args), files)) from error
        reason = str(error) if isinstance(error, ValueError) else repr(error)
        raise ValueError(
            f"mlx-lm cannot build the model in {name}: {reason}"
        ) from error
    unlisted_arrays = {
        id(loader.unread[tensor]) for tensor in unlisted(checkpoint.headers, index)
    }
    _leave_out(unlisted_arrays, model, weights)
    contradictions = unsettled(checkpoint, index.files)
    for tensor, line in contradictions.items():  # before their shapes are compared
        if any(array is loader.unread[tensor] for array in weights.values()):
            raise ValueError(line)
    _check_parameters(model, weights, name, checkpoint, index.files)
    model.update(tree_unflatten(list(weights.items())))
    tensors = _by_identity(loader.unread, checkpoint)
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
    sources = _sources(parameters, tensors, loader, weights)
    _check_used(sources, contradictions)
    _check_used(sources, _unreadable(checkpoint))
    return EmptyModel(model, config, sources, checkpoint)


def _unread(checkpoint: Checkpoint) -> dict[str, mx.array]:
    """Arrays that stand for the tensors, wherever they lie; nobody evaluates them.

    They are ones: mlx-lm looks at values of one type, prism_hadamard_qwen35, and takes
    ones. `check_values` looks at what was read.
    """
    return {
        name: mx.ones(stored.tensor.shape, stored.tensor.dtype)
        for name, stored in checkpoint.tensors.items()
    }


def check_values(model: nn.Module) -> None:
    """Look at the values that mlx-lm looks at while it loads, once they are there.

    Raises: ValueError for signs of a rotation that are not signs.
    """
    for name, array in tree_flatten(model.parameters()):
        if name.endswith(".signs") and mx.any(mx.abs(array) != 1).item():
            raise ValueError(f"{name} has other values than -1 and +1")


def _by_identity(
    unread: Mapping[str, mx.array], checkpoint: Checkpoint
) -> dict[int, Tensor]:
    """The tensors that unread arrays stand for."""
    return {id(a): checkpoint.tensors[name].tensor for name, a in unread.items()}


def _sources(
    parameters: Mapping[str, mx.array],
    tensors: Mapping[int, Tensor],
    loader: "_Loader",
    weights: Mapping[str, mx.array],
) -> dict[str, Source]:
    """Where each parameter comes from: a tensor, or what mlx-lm computes of some.

    `tensors` are those that unread arrays stand for, by the identity of the array;
    `weights` is what mlx-lm loads into the model before it gets an adapter.
    """
    sources: dict[str, Source] = {
        name: tensors[id(parameter)]
        for name, parameter in parameters.items()
        if id(parameter) in tensors
    }
    names = {id(array): name for name, array in weights.items()}
    computed = {
        name: names[id(parameter)]
        for name, parameter in parameters.items()
        if name not in sources
    }
    if not computed:
        return sources
    given = {name: tensors[id(array)] for name, array in loader.unread.items()}
    traced = trace(loader.weights, given, sorted(set(computed.values())))
    for name, inner in computed.items():
        array = weights[inner]
        sources[name] = traced.get(inner) or Computed(
            tuple(given[tensor] for tensor in loader.behind(array)),
            partial(loader.weight, inner),
            array.shape,
            array.dtype,
        )
    return sources


class _Loader:
    """Runs mlx-lm's `load_model` with other arrays than those of the files.

    `unread` stand for the tensors that `load` is not given.
    """

    def __init__(
        self,
        folder: Path,
        model_config: dict[str, Any] | None,
        unread: dict[str, mx.array],
    ) -> None:
        self._folder = folder
        self._model_config = model_config
        self.unread = unread

    def load(
        self, tensors: Mapping[str, mx.array]
    ) -> tuple[nn.Module, dict[str, Any], dict[str, mx.array]]:
        """Build the model, and let mlx-lm make its weights of `tensors`.

        Returns: the model without weights, its config, and the weights by name.

        Raises: ValueError if the config lacks something; whatever mlx-lm raises.
        """
        from mlx_lm.utils import load_model

        weights: dict[str, mx.array] = {}
        as_it_is = SimpleNamespace(from_dict=lambda config: config)

        def model_of(config: dict[str, Any]) -> nn.Module:
            model = unloaded(config)
            sanitize = getattr(model, "sanitize", dict)
            model.sanitize = lambda _: sanitize({**self.unread, **tensors})
            model.load_weights = lambda pairs, strict: weights.update(pairs)
            return model

        with _no_files():
            model, config = load_model(
                self._folder,
                lazy=True,
                strict=False,  # what is wrong with the weights we say ourselves
                model_config=self._model_config,
                get_model_classes=lambda config: (model_of, as_it_is),
            )
        del model.sanitize, model.load_weights  # they hold on to the arrays
        return model, config, weights

    def weights(self, tensors: dict[str, mx.array]) -> dict[str, mx.array]:
        """What mlx-lm makes of `tensors`: weights by name."""
        return self.load(tensors)[2]

    def weight(self, name: str, tensors: dict[str, mx.array]) -> mx.array:
        """What mlx-lm makes of `tensors`: the weight `name`."""
        return self.weights(tensors)[name]

    def behind(self, array: mx.array) -> list[str]:
        """The tensors that an array is made of, sorted: those that are `unread`."""
        names = {f"unread {i}": name for i, name in enumerate(self.unread)}
        marks = dict(zip(names, self.unread.values(), strict=True))
        graph = io.StringIO()
        mx.export_to_dot(graph, array, **marks)
        named = re.findall(r'^"(unread \d+)" ->', graph.getvalue(), re.MULTILINE)
        return sorted({names[mark] for mark in named})


def unloaded(config: dict[str, Any]) -> nn.Module:
    """Make the model of a config as mlx-lm makes it, before any weights.

    Raises: ValueError if mlx-lm cannot import its type, or the config lacks what
        mlx-lm has no default for; what mlx-lm raises for others.
    """
    model_class, args_class = _imported(config)
    try:
        return model_class(args_class.from_dict(config))  # type: ignore[attr-defined]
    except (KeyError, TypeError) as error:
        if lacking := _lacking(error):
            raise ValueError(f"config.json lacks {_some(lacking)}") from error
        raise


def _lacking(error: KeyError | TypeError) -> list[str]:
    """The fields without which a model's arguments cannot be made, if that is it."""
    if isinstance(error, KeyError):
        return [str(error.args[0])]
    missing = re.search(r"__init__\(\) missing \d+ required .*: (.*)", str(error))
    return re.findall(r"'(\w+)'", missing[1]) if missing else []


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


@contextlib.contextmanager
def _no_files() -> Iterator[None]:
    """Keep mlx-lm from opening files of weights: it is given others, and MLX refuses a
    file for the type of one tensor in it, used or not."""
    load = mx.load
    mx.load = lambda *_, **__: {}
    try:
        yield
    finally:
        mx.load = load


def _leave_out(
    others: Set[int], model: nn.Module, weights: dict[str, mx.array]
) -> None:
    """Take from `weights` those that are not the model's if they are among `others`."""
    for name in weights.keys() - dict(tree_flatten(model.parameters())).keys():
        if id(weights[name]) in others:
            del weights[name]


def _check_parameters(
    model: nn.Module,
    weights: Mapping[str, mx.array],
    name: str,
    checkpoint: Checkpoint,
    index: Mapping[str, str],
) -> None:
    """Compare the names and shapes of weights with the model's parameters."""
    expected = dict(tree_flatten(model.parameters()))
    if missing := sorted(expected.keys() - weights.keys()):
        files = absent_files(missing, checkpoint.headers, index)
        raise ValueError(_lacks(name, missing, files))
    if extra := sorted(weights.keys() - expected.keys()):
        raise ValueError(
            f"the checkpoint in {name} has {_some(extra)}, which the model does not "
            "have"
        )
    _check_shapes(model, weights, name)


def _lacks(name: str, missing: list[str], files: list[str]) -> str:
    """What an error says of missing tensors, which should be in `files`."""
    line = f"the checkpoint in {name} lacks {_some(missing)}"
    if not files:
        return line
    return (
        f"{line}: its index has them in {', '.join(files)}, and there is no such file; "
        "fetch the checkpoint again"
    )


def _unreadable(checkpoint: Checkpoint) -> dict[str, str]:
    """Tensors of types that MLX does not read.

    Returns: by name, what an error says of it.
    """
    if all(stored.tensor.is_readable for stored in checkpoint.tensors.values()):
        return {}
    files = {
        stored: file
        for file, header in checkpoint.headers.items()
        for stored in header.tensors.values()
    }
    return {
        name: f"{name} in {files.get(stored, 'the adapter')} is of type "
        f"{stored.tensor.kind}, which MLX does not read: take a checkpoint of another "
        "type"
        for name, stored in checkpoint.tensors.items()
        if not stored.tensor.is_readable
    }


def _check_used(sources: Mapping[str, Source], faults: Mapping[str, str]) -> None:
    """See that no parameter is made of a tensor that has a fault."""
    if not faults:
        return
    for source in sources.values():
        for tensor, _ in source.reads(Slice(source.shape)):
            if tensor.name in faults:
                raise ValueError(faults[tensor.name])


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


def check_quantized_activations(model: nn.Module) -> None:
    """Try MLX's product of quantized activations, which not every device has.

    mlx-lm finds out in the middle of a prompt.

    Raises: ValueError, with the first layer that needs it.
    """
    layers = (
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.QQLinear)
    )
    path, layer = next(layers, ("", None))
    if layer is None:
        return
    x, kind = mx.zeros((32, 128)), (layer.group_size, layer.bits, layer.mode)
    weight, scales, *_ = mx.quantize(x, *kind)
    try:
        mx.eval(mx.qqmm(x, weight, scales, *kind))
    except RuntimeError as error:
        raise ValueError(
            f"config.json asks for quantize_activations, as in {path}, and MLX cannot "
            f"on this device ({error}): set it to false there"
        ) from error
