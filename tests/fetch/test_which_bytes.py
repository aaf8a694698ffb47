"""Whatever files a checkpoint has, in every form the same tensors are read, or one line
says why not: from a folder, cut, and by name from a hub."""

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from hub_server import Hub, Request
from kept import kept
from reference import PROMPT, TOLERANCE, on_rank_0
from test_fetching import Client
from tiny import Tiny

from mlxtp import Communicator
from mlxtp.checkpoint import cut, runs, verify, writing
from mlxtp.checkpoint.cut import manifest_of, rank_folders
from mlxtp.checkpoint.headers import INDEX, read_header
from mlxtp.comm.errors import UsageError
from mlxtp.fetch import hub
from mlxtp.loading import load_model
from mlxtp.plan.model import open_model
from mlxtp.shard import report, shard

Q = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"
UNUSED = "model.layers.0.self_attn.rotary_emb.inv_freq"  # mlx-lm leaves it out
FILES = [f"model-{n}-of-3.safetensors" for n in range(3)]


@dataclass
class Stored:
    """A tensor as a file has it: its type, its shape and its bytes."""

    kind: str
    shape: tuple[int, ...]
    data: bytes


Files = dict[str, dict[str, Stored]]


def write(folder: Path, files: Files, index: object = None) -> None:
    """Write the files of a folder, and its index; what is text is written as it is."""
    for file, tensors in files.items():
        header, end = {}, 0
        for name, stored in tensors.items():
            begin, end = end, end + len(stored.data)
            entry = {"dtype": stored.kind, "shape": stored.shape}
            header[name] = {**entry, "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        data = b"".join(stored.data for stored in tensors.values())
        (folder / file).write_bytes(struct.pack("<Q", len(text)) + text + data)
    if index is not None:
        text = index if isinstance(index, str) else json.dumps({"weight_map": index})
        (folder / INDEX).write_text(text)


def in_three(tensors: dict[str, Stored]) -> tuple[Files, dict[str, str]]:
    """Tensors in three files, and the index that says where."""
    names = sorted(tensors)
    files = {
        file: {name: tensors[name] for name in names[number::3]}
        for number, file in enumerate(FILES)
    }
    return files, {name: file for file in files for name in files[file]}


def copied(
    tensors: dict[str, Stored], name: str, change: Callable[[Stored, int], Stored]
) -> tuple[Files, dict[str, str]]:
    """A tensor in all of three files: what `change` makes of it for each of them."""
    files, index = in_three(tensors)
    for number, file in enumerate(FILES):
        files[file][name] = change(tensors[name], number)
    return files, index


def as_it_is(stored: Stored, _: int) -> Stored:
    return stored


def stale_but_in(right: int) -> Callable[[Stored, int], Stored]:
    """Other values, and another type, in all files but one."""

    def change(stored: Stored, number: int) -> Stored:
        if number == right:
            return stored
        if number == 2:
            half = np.frombuffer(stored.data, np.float32).astype(np.float16)
            return Stored("F16", stored.shape, half.tobytes())
        return Stored(stored.kind, stored.shape, stored.data[::-1])

    return change


def last_byte(stored: Stored, number: int) -> Stored:
    """Another last byte in the last file: in a row that the last rank reads."""
    if number < 2:
        return stored
    return Stored(
        stored.kind, stored.shape, stored.data[:-1] + bytes([stored.data[-1] ^ 1])
    )


def as_half(stored: Stored, number: int) -> Stored:
    return stale_but_in(0)(stored, number) if number == 2 else stored


Make = Callable[[Path, dict[str, Stored]], None]


def index_names_one(folder: Path, tensors: dict[str, Stored]) -> None:
    files, index = copied(tensors, Q, stale_but_in(1))
    write(folder, files, {**index, Q: FILES[1]})


def equal_copies_and_an_index(folder: Path, tensors: dict[str, Stored]) -> None:
    files, index = copied(tensors, Q, as_it_is)
    files[FILES[0]] |= {NORM: tensors[NORM]}
    files[FILES[2]] |= {NORM: tensors[NORM]}
    write(folder, files, {**index, Q: FILES[2]})


def equal_copies(folder: Path, tensors: dict[str, Stored]) -> None:
    write(folder, copied(tensors, Q, as_it_is)[0])


def stray_file(folder: Path, tensors: dict[str, Stored]) -> None:
    """One that the index does not name, with stale and with unknown tensors."""
    files, index = in_three(tensors)
    more = {
        Q: stale_but_in(0)(tensors[Q], 1),
        Q.replace("weight", "scales"): tensors[Q],
    }
    write(folder, {**files, "model.safetensors": more}, index)


def index_of_other_shards(folder: Path, tensors: dict[str, Stored]) -> None:
    index = dict.fromkeys(
        [*tensors, "vision.weight"], "model-00001-of-00002.safetensors"
    )
    write(folder, {"model.safetensors": tensors}, index)


def index_elsewhere(folder: Path, tensors: dict[str, Stored]) -> None:
    index = dict.fromkeys(tensors, "../clean/model.safetensors")
    write(folder, {"model.safetensors": tensors}, index)


def no_index(folder: Path, tensors: dict[str, Stored]) -> None:
    write(folder, {"model.safetensors": tensors}, "{")


def other_names(folder: Path, tensors: dict[str, Stored]) -> None:
    index = dict.fromkeys(tensors, "weights.safetensors")
    write(folder, {"weights.safetensors": tensors}, index)


def unused_types(folder: Path, tensors: dict[str, Stored]) -> None:
    """One that MLX reads as bytes, and one with items of half a byte."""
    one = {UNUSED: Stored("F8_E8M0", (3,), bytes(3))}
    other = {UNUSED.replace("0", "1"): Stored("F4", (3, 2), b"abc")}
    write(folder, {"model.safetensors": one | tensors | other})


def unused_copies_differ(folder: Path, tensors: dict[str, Stored]) -> None:
    files, _ = in_three(tensors)
    for number, file in enumerate(FILES):
        files[file][UNUSED] = Stored("F32", (1,), bytes([number] * 4))
    write(folder, files)


RIGHT: list[Make] = [
    index_names_one, equal_copies_and_an_index, equal_copies, stray_file,
    index_of_other_shards, index_elsewhere, no_index, other_names, unused_types,
    unused_copies_differ,
]  # fmt: skip


def contradicting(folder: Path, tensors: dict[str, Stored]) -> None:
    write(folder, copied(tensors, Q, last_byte)[0])


def another_type(folder: Path, tensors: dict[str, Stored]) -> None:
    files, index = copied(tensors, Q, as_half)
    write(folder, files, {**index, Q: "gone.safetensors"})


def lacks_a_file(folder: Path, tensors: dict[str, Stored]) -> None:
    files, index = in_three(tensors)
    del files[index[Q]]
    write(folder, files, index)


def lacks_a_tensor(folder: Path, tensors: dict[str, Stored]) -> None:
    write(folder, {"model.safetensors": {n: t for n, t in tensors.items() if n != Q}})


def unreadable(folder: Path, tensors: dict[str, Stored]) -> None:
    wide = np.frombuffer(tensors[Q].data, np.float32).astype(np.float64).tobytes()
    tensors = {**tensors, Q: Stored("F64", tensors[Q].shape, wide)}
    write(folder, {"model.safetensors": tensors})


def cut_short(folder: Path, tensors: dict[str, Stored]) -> None:
    write(folder, {"model.safetensors": tensors})
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-64])


def unexpected(folder: Path, tensors: dict[str, Stored]) -> None:
    """An index that is stale has no say in what is the model's."""
    files, index = in_three(tensors)
    files[FILES[0]]["model.extra"] = tensors[Q]
    write(folder, files, {**index, "vision.weight": FILES[0]})


# How a checkpoint is wrong, and what is said in all forms.
WRONG: dict[Make, str] = {
    contradicting: rf"{Q} is in {FILES[0]} and in {FILES[2]}, and they differ",
    another_type: rf"{Q} is in {FILES[0]} and in {FILES[2]}, and they differ",
    lacks_a_file: r"lacks .*its index has them in \S+, .*; fetch the checkpoint again$",
    lacks_a_tensor: rf"lacks {Q}$",
    unreadable: rf"^{Q} in model.safetensors is of type F64, which MLX does not read",
    cut_short: r"model.safetensors is no whole safetensors file",
    unexpected: "has model.extra, which the model does not have",
}


def logits(model: nn.Module) -> np.ndarray:
    return np.array(model(mx.array([PROMPT])))


@pytest.fixture(scope="module")
def expected(comm: Communicator) -> tuple[Path, np.ndarray]:
    """The folder of the folders, and mlx-lm's logits of the clean checkpoint."""

    def make(root: Path) -> tuple[Path, np.ndarray]:
        clean = root / "clean"
        clean.mkdir()
        Tiny({"intermediate_size": 128}).save(clean)
        (clean / INDEX).unlink()
        content = (clean / "model.safetensors").read_bytes()
        tensors = {}
        for name, stored in read_header(clean / "model.safetensors").tensors.items():
            tensor, start = stored.tensor, stored.pieces[0].offset
            size = int(np.prod(tensor.shape)) * tensor.dtype.size
            data = content[start : start + size]
            tensors[name] = Stored(tensor.kind, tensor.shape, data)
        for make in (*RIGHT, *WRONG):
            folder = root / make.__name__
            weights = shutil.ignore_patterns("*.safetensors")
            shutil.copytree(clean, folder, ignore=weights)
            make(folder, tensors)
        return root, logits(mlx_lm.utils.load_model(clean)[0])

    result: tuple[Path, np.ndarray] = kept(comm, "which-bytes", make)
    return result


@pytest.fixture(scope="module")
def served(comm: Communicator, expected: tuple[Path, np.ndarray]) -> Iterator[Hub]:
    """A hub with all of the folders; only rank 0's answers."""
    server = Hub({f"org/{f.name}": f for f in expected[0].iterdir() if f.is_dir()})
    if comm.rank:
        server.port = comm.bcast_object(None)
        yield server
    else:
        with server:
            comm.bcast_object(server.port)
            yield server


@pytest.fixture
def client(
    comm: Communicator, served: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Client:
    result = Client(comm, monkeypatch)
    result.use(served.url, tmp_path)
    return result


@pytest.mark.parametrize("make", RIGHT, ids=lambda make: make.__name__)
def test_the_same_in_every_form(
    make: Make,
    comm: Communicator,
    client: Client,
    expected: tuple[Path, np.ndarray],
    shared_path: Path,
) -> None:
    root, wanted = expected
    folder, output = root / make.__name__, shared_path / make.__name__
    on_rank_0(comm, lambda: shard(folder, [1] * comm.size, output))
    for form in (folder, output, f"org/{folder.name}"):
        assert_gives(load_model(form, comm)[0], wanted)
    joined = shared_path / f"{make.__name__}-joined"
    on_rank_0(comm, lambda: joined_again(output, joined))
    for file in folder.iterdir():
        assert (joined / file.name).read_bytes() == file.read_bytes(), file


def assert_gives(model: nn.Module, wanted: np.ndarray) -> None:
    difference = np.abs(logits(model) - wanted).max()
    assert difference <= TOLERANCE[mx.float32] * np.abs(wanted).max()


def joined_again(output: Path, joined: Path) -> None:
    assert report(output)
    writing.join(output, joined)


@pytest.mark.parametrize("make", WRONG, ids=lambda make: make.__name__)
def test_one_line_in_every_form(
    make: Make,
    comm: Communicator,
    client: Client,
    expected: tuple[Path, np.ndarray],
    tmp_path: Path,
) -> None:
    folder = expected[0] / make.__name__
    client.patch.setattr("mlxtp.checkpoint.tensors.StoredTensor.read", None)
    client.patch.setattr(runs, "BLOCK_BYTES", 1000)  # copies are compared in parts
    client.patch.setattr(hub, "COMPARE_BYTES", 10_000)
    lines = set()
    for form in (str(folder), f"org/{folder.name}"):
        with pytest.raises(UsageError, match=WRONG[make]) as raised:
            load_model(form, comm)
        lines.add(str(raised.value).replace(form, "").removeprefix("/"))
    with pytest.raises(ValueError, match=WRONG[make]) as of_cut:
        shard(folder, [1] * comm.size, tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
    with (
        pytest.raises(ValueError, match=WRONG[make]) as of_plan,
        open_model(str(folder)) as planned,
    ):
        planned.build()
    for error in (of_cut, of_plan):
        lines.add(str(error.value).replace(str(folder), "").removeprefix("/"))
    assert len(lines) == 1, lines


def test_a_copy_that_nobody_reads_is_hashed_too(
    comm: Communicator, served: Hub, client: Client, tmp_path: Path
) -> None:
    """Else wrong bytes of what lies beside it would be kept."""

    def fault(request: Request) -> str | None:
        is_big = request.range and not request.range.startswith("bytes=0-")
        return "wrong" if is_big and request.path.endswith(FILES[2]) else None

    client.patch.setattr(served, "fault", fault)
    comm.barrier()
    with pytest.raises(UsageError, match=rf"{FILES[2]} of org/index_names_one came"):
        load_model("org/index_names_one", comm)


def test_a_cache_of_files_with_unsettled_copies_is_made_anew(
    comm: Communicator,
    client: Client,
    expected: tuple[Path, np.ndarray],
    tmp_path: Path,
) -> None:
    """An older release did not say which copy is read, and wrote parts of both."""
    load_model("org/equal_copies", comm)
    (file,) = tmp_path.glob(f"assets/**/{cut.CHECKPOINT}")
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "copies": {}}))
    with pytest.raises(ValueError, match="does not describe a checkpoint"):
        report(file.parent)
    assert_gives(load_model("org/equal_copies", comm)[0], expected[1])
    assert report(file.parent)


@pytest.mark.once
def test_verify_compares_what_is_read(
    comm: Communicator,
    client: Client,
    expected: tuple[Path, np.ndarray],
    tmp_path: Path,
) -> None:
    """Not only what was written: hashes of wrong bytes may be right."""
    output = tmp_path / "cut"
    shard(expected[0] / "equal_copies", [1, 1], output)
    assert not verify.verify(output)
    rewrite(output / "rank-1-of-2", NORM)
    faults = verify.verify(output)
    assert faults and all(
        NORM in fault and "is not what is read" in fault for fault in faults
    )
    load_model("org/equal_copies", Communicator())
    (folder,) = (file.parent for file in tmp_path.glob(f"assets/**/{cut.CHECKPOINT}"))
    assert not verify.verify(folder)
    (part,) = rank_folders(folder)
    rewrite(part, Q)
    # Its copies are in all of the files.
    assert [fault.split()[0] for fault in verify.verify(folder)] == FILES
    manifest = manifest_of(part)
    slices = manifest["files"][FILES[0]]["slices"]
    manifest["files"][FILES[1]]["slices"][Q] = slices[Q]
    cut.write_json(part / cut.MANIFEST, manifest)
    with pytest.raises(ValueError, match=rf"{FILES[1]} does not hold {Q}"):
        verify.verify(folder)


def rewrite(part: Path, name: str) -> None:
    """Change a byte of a slice, and its hash in the manifest with it."""
    manifest = manifest_of(part)
    for file, entry in manifest["files"].items():
        if name not in entry["slices"]:
            continue
        stored = read_header(part / file).tensors[name]
        content = bytearray((part / file).read_bytes())
        content[stored.pieces[0].offset] ^= 1
        (part / file).write_bytes(content)
        whole = stored.pieces[0].part
        entry["slices"][name]["sha256"] = verify.sha256(stored, whole)
    cut.write_json(part / cut.MANIFEST, manifest)
