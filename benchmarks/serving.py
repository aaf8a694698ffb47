"""Servers that a benchmark starts, clients that ask them, and a model for both."""

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import httpx2
import mlx.core as mx
from mlx_lm.utils import load_model, save_model
from models import make
from ranks import HOSTFILE, environment
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlxtp.stories import PATH as STORIES

# The name that both servers know the model by.
MODEL = "default_model"

# How long a server may take to load, and to end.
START_SECONDS = 120.0
END_SECONDS = 30.0


def make_model(folder: Path, config: dict[str, Any]) -> Path:
    """Save a model in float32 whose tokens are words, and that never ends its text.

    Token 7 is the word w7. The last one ends a text, and its logit is 0: with the
    embedding as the head, others are above it.
    """
    if (folder / "config.json").exists():
        return folder
    make(folder, config, mx.float32)
    file = folder / "model.safetensors"
    tensors = mx.load(str(file))
    name = "model.embed_tokens.weight"
    tensors[name] = mx.concatenate(
        [tensors[name][:-1], mx.zeros_like(tensors[name][:1])]
    )
    new = file.with_suffix(".new.safetensors")
    mx.save_safetensors(str(new), tensors, metadata={"format": "mlx"})
    new.rename(file)
    words = {f"w{number}": number for number in range(config["vocab_size"])}
    last = f"w{config['vocab_size'] - 1}"
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=last, clean_up_tokenization_spaces=False
    ).save_pretrained(folder)
    return folder


def in_float32(folder: Path) -> Path:
    """Write the model that ships to a folder, in float32."""
    model, _ = load_model(STORIES)
    model.set_dtype(mx.float32)
    folder.mkdir()
    for file in STORIES.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    save_model(folder, model)
    return folder


def prompt(number: int, tokens: int) -> str:
    """A prompt of so many tokens; another number gives one that begins otherwise."""
    draw = random.Random(number)
    return " ".join(f"w{draw.randrange(2, 7000)}" for _ in range(tokens))


def mlxtp_command(args: Any, port: int) -> tuple[list[Any], dict[str, str]]:
    """The command line of our server, and its variables."""
    command = [sys.executable, "-m", "mlxtp.serve", "--port", port]
    command += ["--model", args.folder, "--served-model-name", MODEL]
    command += ["--hostfile", args.hostfile] if args.hostfile else []
    command += [] if args.ranks is None else ["--ranks", args.ranks]
    return [*command, *getattr(args, "options", [])], {}


def mlx_lm_command(args: Any, port: int) -> tuple[list[Any], dict[str, str]]:
    """The command line of mlx-lm's server over MPI, and its variables."""
    command = [Path(sys.executable).parent / "mpirun", "-hostfile", HOSTFILE]
    command += ["-n", args.ranks or 2, sys.executable, "-m", "mlx_lm", "server"]
    command += ["--model", args.folder, "--port", port, "--log-level", "WARNING"]
    # MLX's MPI backend opens a library by name; the wheel's plain one is no library.
    return command, {"MLX_MPI_LIBNAME": "libmpi.so.40"}


COMMANDS = {"mlxtp": mlxtp_command, "mlx-lm": mlx_lm_command}


@dataclass
class Server:
    """A server that answers: its process, its address, and what it says."""

    process: subprocess.Popen[bytes]
    url: str
    log: IO[bytes]

    def said(self) -> str:
        """All that it has printed."""
        number = self.log.fileno()  # its place is the server's
        data = os.pread(number, os.fstat(number).st_size, 0)
        return data.decode(errors="replace")


@contextmanager
def served(side: str, args: Any) -> Iterator[Server]:
    """Start a server of `COMMANDS`, wait until it answers, and end it.

    What it said is printed where something fails.

    Raises: RuntimeError if it ends or does not answer.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command, variables = COMMANDS[side](args, port)
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment(**variables),
        )
        server = Server(process, f"http://127.0.0.1:{port}", log)
        try:
            if not _answers(server):
                raise RuntimeError(f"{side} does not answer")
            yield server
        except BaseException:
            print(server.said(), file=sys.stderr)
            raise
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _answers(server: Server) -> bool:
    """Wait until a server is healthy and has answered once."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and server.process.poll() is None:
        try:
            if httpx2.get(f"{server.url}/health", timeout=5).status_code == 200:
                body = {"model": MODEL, "prompt": prompt(-1, 8), "max_tokens": 4}
                url = f"{server.url}/v1/completions"
                return httpx2.post(url, json=body, timeout=60).status_code == 200
        except httpx2.HTTPError:
            pass
        time.sleep(0.1)
    return False


@dataclass
class Answer:
    """What came of a request: when each piece came, in seconds, and the text.

    `tokens` is what `usage` says; None where the answer broke off.
    """

    begun: float
    times: list[float] = field(default_factory=list)
    text: str = ""
    tokens: int | None = None

    @property
    def first_seconds(self) -> float:
        """The time to the first token."""
        return self.times[0] - self.begun

    @property
    def tokens_per_second(self) -> float:
        """The speed behind the first token."""
        assert self.tokens is not None
        return (self.tokens - 1) / (self.times[-1] - self.times[0])


@asynccontextmanager
async def client(url: str) -> AsyncIterator[httpx2.AsyncClient]:
    """A client without limits."""
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(base_url=url, timeout=600, limits=limits) as opened:
        yield opened


async def stream(
    http: httpx2.AsyncClient, text: str, max_tokens: int, answer: Answer | None = None
) -> Answer:
    """Ask for a greedy completion, and read it as it comes, into `answer`.

    Raises: httpx2.HTTPError if the connection breaks, or the server refuses.
    """
    body = {
        "model": MODEL,
        "prompt": text,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    answer = answer or Answer(time.perf_counter())
    answer.begun = time.perf_counter()
    async with http.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            now, event = time.perf_counter(), json.loads(line[6:])
            if event.get("usage"):
                answer.tokens = event["usage"]["completion_tokens"]
            if event["choices"] and event["choices"][0].get("text"):
                answer.times.append(now)
                answer.text += event["choices"][0]["text"]
    return answer


async def load(
    url: str, prompts: Sequence[str], max_tokens: int
) -> tuple[float, list[Answer], int]:
    """Ask all at once.

    Returns: tokens a second of all together, the answers, and how many requests
        failed.
    """
    async with client(url) as http:
        begun = time.perf_counter()
        asked = [stream(http, text, max_tokens) for text in prompts]
        results = await asyncio.gather(*asked, return_exceptions=True)
        seconds = time.perf_counter() - begun
    answers = [result for result in results if isinstance(result, Answer)]
    for result in results:
        if not isinstance(result, Answer | httpx2.HTTPError):
            raise result
    tokens = sum(answer.tokens or 0 for answer in answers)
    return tokens / seconds, answers, len(results) - len(answers)
