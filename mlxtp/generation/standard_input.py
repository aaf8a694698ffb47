"""The prompt of a command line, the same text on all ranks."""

import os
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING

from mlxtp.cluster.job import read_input
from mlxtp.comm import launcher

# The front of a server, which reads a prompt as well, imports no MLX.
if TYPE_CHECKING:
    from mlxtp.comm.communicator import Communicator


def read(prompt: str, file: str | None, comm: "Communicator") -> str:
    """Give all ranks rank 0's `text_of`: files are its own, and so is standard input.

    Raises: UsageError if there is no such file, or it is empty or no text.
    """
    if file is None and prompt != "-":
        return text_of(prompt, file)
    text = ""
    with comm.unlimited(), comm.agreement():
        if comm.rank == 0:
            text = text_of(prompt, file)
    return str(comm.bcast_object(text))


def text_of(prompt: str, file: str | None) -> str:
    r"""Give the text of `--prompt-file`, or else of `--prompt`.

    A `prompt` of `-` stands for standard input. On a command line \n and \t stand for a
    new line and a tab.

    Raises: ValueError if there is no such file, or it is empty or no text.
    """
    if file is not None:
        return _text_of_file(file)
    if prompt == "-":
        return _text_of_input()
    return prompt.replace("\\n", "\n").replace("\\t", "\t")


def _text_of_input() -> str:
    """Read standard input: to its end, or under mpirun as long as the launcher says."""
    size = launcher.input_bytes()
    return _decoded(read_input() if size is None else _receive(size), "standard input")


def _receive(size: int) -> bytes:
    """Read so many bytes from standard input, which mpirun does not end."""
    data = bytearray()
    while len(data) < size:
        block = os.read(0, size - len(data))
        if not block:
            raise ValueError(
                f"standard input broke off after {len(data):,} of {size:,} bytes"
            )
        data += block
    return bytes(data)


def _text_of_file(name: str) -> str:
    file = Path(name)
    if not file.exists():
        raise ValueError(f"--prompt-file: there is no file {name}")
    if not file.is_file():  # a pipe has no end under mpirun
        raise ValueError(f"--prompt-file: {name} is no regular file")
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ValueError(f"--prompt-file: {name}: {error.strerror}") from None
    return _decoded(data, f"--prompt-file: {name}")


def _decoded(data: bytes, source: str) -> str:
    """Decode as text files are: UTF-8, with any kind of line ends."""
    try:
        text = TextIOWrapper(BytesIO(data), "utf-8").read()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{source} is no text in UTF-8: byte {error.start:,} of it is "
            f"0x{data[error.start]:02x}"
        ) from None
    if not text.strip():
        raise ValueError(f"{source} is empty: wanted some text")
    return text
