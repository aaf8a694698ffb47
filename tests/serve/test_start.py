"""How the server starts and ends, with ranks that have no model."""

import asyncio
import configparser
import io
import os
import plistlib
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from life import FAKE

from mlxtp.cluster import allocation as allocations
from mlxtp.cluster.job import JobError
from mlxtp.serve import __main__ as front
from mlxtp.serve import log, messages, options, supervisor
from mlxtp.serve.front.ranks import Ranks
from mlxtp.serve.hosts import check_first_host
from mlxtp.serve.messages import FOLDER_VARIABLE

pytestmark = pytest.mark.once

# A rank 0 that is never ready, and one that does not hear that it is to end.
LOADING = FAKE.replace("runpy.", "import time; time.sleep(60); runpy.")
DEAF = FAKE.replace(
    "runpy.", "import fake_ranks; fake_ranks.messages.End = fake_ranks.Start; runpy."
)
REFUSING = "from mlxtp.comm import launcher; launcher.refuse('mlxtp.serve', 'no model')"

MISTAKES: dict[str, tuple[list[str], str]] = {
    "an unknown option": (["--prt", "1"], "unrecognized arguments: --prt 1"),
    "no number": (["--port", "web"], "argument --port: invalid int value: 'web'"),
    "no port": (["--port", "70000"], "--port is 70000: wanted from 0 to 65535"),
    "no address": (["--host", " "], "--host is ' ': wanted a name or an address"),
    "no name of a host": (["--host", "a" * 64], "cannot listen on aaa"),
    "no concurrency": (["--max-concurrency", "0"], "wanted at least 1"),
    "a negative queue": (["--max-queue", "-1"], "wanted at least 0"),
    "no context": (["--context", "0"], "--context is 0: wanted at least 1"),
    "no cache": (["--kv-gb", "nan"], "--kv-gb is nan: wanted above 0"),
    "endless draining": (["--drain-seconds", "inf"], "wanted at least 0"),
    "cold sampling": (["--temp", "-1"], "--temp is -1.0: wanted at least 0"),
    "a wide penalty": (["--presence-penalty", "3"], "wanted from -2 to 2"),
    "no name": (["--served-model-name", "a", ""], "wanted names in UTF-8"),
    "no origin": (["--allowed-origins", "a.org"], "'a.org': wanted origins such as"),
    "an origin's page": (["--allowed-origins", "*,http://a/b"], "wanted origins"),
    "no object": (["--chat-template-args", "[1]"], "'[1]': wanted a JSON object"),
    "two kinds of keys": (["--api-key", "a", "--api-key-file", "b"], "one of them"),
    "no file of keys": (["--api-key-file", "no/keys"], "No such file or directory"),
    "an empty file of keys": (["--api-key-file", os.devnull], "wanted a key"),
    "a key with a space": (
        ["--api-key", "se cret"],
        "--api-key: wanted a key of ASCII",
    ),
    "a kept cache of none": (
        ["--prefix-cache-dir", "x", "--prefix-cache-gb", "0"],
        "--prefix-cache-gb 0 turns off",
    ),
    "shares that are none": (["--shares", "1,x"], "'1,x': wanted whole numbers"),
    "MLX's algorithms": (["--transport", "ring", "--wire", "int8"], "--wire go with"),
    "no ranks": (["--ranks", "0"], "the number of ranks is 0: wanted 1 or more"),
    "no hostfile": (["--hostfile", "no/hosts"], "no hostfile no/hosts"),
}


def test_the_services_of_the_documentation() -> None:
    """The launchd file and the systemd unit start the same, and leave time to end."""
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    [plist], [unit] = (
        re.findall(rf"^```{kind}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
        for kind in ("xml", "ini")
    )
    daemon = plistlib.loads(plist.encode())
    service = configparser.ConfigParser()
    service.read_string(unit)
    words = service["Service"]["ExecStart"].split()
    assert words[:3] == daemon["ProgramArguments"][:3]
    for arguments in (words[3:], daemon["ProgramArguments"][3:]):
        args = options.parse(arguments)
        assert args.api_key_file and args.hostfile == "hostfiles/studio5"
        needed = args.drain_seconds + 2 * supervisor.END_SECONDS
        assert int(service["Service"]["TimeoutStopSec"]) >= needed
        assert daemon["ExitTimeOut"] >= needed


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(
    case: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments, words = MISTAKES[case]
    monkeypatch.setenv(FOLDER_VARIABLE, "")
    monkeypatch.setattr(sys, "argv", ["mlxtp.serve", "--port", "0", *arguments])
    with pytest.raises(SystemExit) as end:
        front.main()
    said = capfd.readouterr()
    assert end.value.code == 2 and said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith("mlxtp.serve: error: ") and words in said.err
    assert "cret" not in said.err
    folder = os.environ[FOLDER_VARIABLE]
    assert folder == "" or not Path(folder).exists()


def test_a_port_in_use_is_one_line_of_a_program_without_mlx() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        program = (
            "import sys; from mlxtp.serve import __main__ as front;"
            "print(*{'mlx', 'mlx_lm', 'mpi4py', 'numpy'} & {*sys.modules});"
            f"sys.argv[1:] = ['--port', '{port}']; front.main()"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
        )
    assert done.returncode == 2 and done.stdout == "\n"
    line = (
        f"mlxtp.serve: error: cannot listen on 127.0.0.1 port {port}: Address already"
    )
    assert done.stderr.startswith(line) and done.stderr.count("\n") == 1


def test_under_mpirun_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(JobError, match="it starts mpirun itself"):
        options.parse([])


def test_the_ranks_get_what_is_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the front its own; no rank gets a key."""
    keys = tmp_path / "keys"
    keys.write_text("first-secret\n\nsecond-secret\n")
    monkeypatch.setenv(options.KEY_VARIABLE, "third-secret")
    of_ranks = ["--model=-m", "--shares=2,1", "--kv-bits=8", "--trust-remote-code"]
    of_ranks += ['--chat-template-config={"a": 1}']
    of_front = [*("--temp", "0", "--max-tokens", "-1"), "--api-key-file", str(keys)]
    of_front += ["--allowed-origins", "http://A.org/,https://b:1"]
    of_front += ["--allowed-origins=*"]
    args = options.parse([*of_ranks, *of_front])
    words = options.ranks_arguments(args)
    assert sorted(words) == sorted(of_ranks)
    for name, value in vars(options.parse_ranks(words)).items():
        assert value == getattr(args, name)

    config = options.config(args, 81)
    assert config.api_keys == ("first-secret", "second-secret") and config.port == 81
    assert config.model_names == ("-m",)
    assert config.allowed_origins == ("http://a.org", "https://b:1", "*")
    assert config.defaults == {"temperature": 0.0, "max_tokens": None}
    assert options.KEY_VARIABLE not in os.environ  # mpirun would pass it on

    monkeypatch.setenv(options.KEY_VARIABLE, "third-secret")
    unset = options.config(options.parse([]), 81)
    assert unset.api_keys == ("third-secret",)
    assert unset.defaults == {} and options.ranks_arguments(options.parse([])) == []


def test_the_first_host_is_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a hostfile, of Slurm's hosts, of PBS's."""
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=2\nfar.invalid slots=2\n")
    check_first_host(str(hosts), None)
    monkeypatch.setenv("PBS_NODEFILE", str(hosts))
    given = allocations.allocation()
    assert given is not None and given.hosts == ("localhost", "far.invalid")
    check_first_host(None, given)

    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\necho "$3" | tr , "\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_NODELIST", "far.invalid,localhost")
    given = allocations.allocation()
    assert given is not None and given.hosts == ("far.invalid", "localhost")
    with pytest.raises(JobError, match="Slurm's hosts: the first host is far"):
        check_first_host(None, given)
    scontrol.write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(JobError, match="scontrol does not tell its hosts"):
        allocations.allocation()


def test_draining(start, capfd: pytest.CaptureFixture[str]) -> None:
    """SIGTERM: what is under way ends, new requests are sent away, and all ends."""

    async def life() -> None:
        server = start(FAKE, "--served-model-name", "stories")
        await server.is_ready()
        stream = asyncio.create_task(server.ask("wait: 1.5\nSecret words"))
        await asyncio.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.1)
        refused = await server.ask("too late")
        assert refused.status == 503 and refused.headers["Retry-After"]
        answer = await stream
        assert answer.status == 200 and "error" not in answer.text
        assert await server.end() == 0

    asyncio.run(life())
    command, listening, ready, *rest = capfd.readouterr().err.splitlines()
    assert command.startswith(sys.executable)
    assert listening.startswith("mlxtp.serve: http://127.0.0.1:")
    assert "loading stories on one rank; --ranks N or" in listening
    assert ready == "mlxtp.serve: ready: stories on 5 ranks, 4,096 tokens of context"
    assert [line.partition(",")[0] for line in rest] == [
        "mlxtp.serve: ends when the requests under way have ended"
    ]


def test_a_log_that_nobody_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb", buffering=0) as unbuffered:
        stderr = io.TextIOWrapper(unbuffered, write_through=True)
        monkeypatch.setattr(sys, "stderr", stderr)
        log.say("ready")
        log.say_line(["mpirun"])


def test_draining_has_an_end(
    start, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of --drain-seconds, or by a second signal; clients are told."""

    async def life(seconds: str, signals: int) -> None:
        server = start(FAKE, "--drain-seconds", seconds)
        await server.is_ready()
        stream = asyncio.create_task(server.ask("hang:"))
        await asyncio.sleep(0.2)
        for _ in range(signals):
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(0.1)
        began = time.monotonic()
        assert "the server ends" in (await stream).text
        assert await server.end() == 0
        assert time.monotonic() - began < 5

    async def half_a_body() -> None:
        server = start(FAKE, "--drain-seconds", "0")
        await server.is_ready()
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n")
        writer.write(b"Content-Length: 9\r\n\r\n{")
        await asyncio.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert b" 503 " in await reader.readline()
        writer.close()
        assert await server.end() == 0

    asyncio.run(life("0.2", 1))
    asyncio.run(life("60", 2))
    monkeypatch.setattr(front, "LAST_READ_SECONDS", 0.1)
    asyncio.run(half_a_body())
    assert "Traceback" not in capfd.readouterr().err


def test_ranks_that_do_not_end_in_order(
    start, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Those that load are ended at once, those that do not listen after a while."""

    async def life(program: str, end_seconds: float) -> None:
        monkeypatch.setattr(supervisor, "END_SECONDS", end_seconds)
        server = start(program, "--host", "0.0.0.0")
        await server.ranks()
        if program == DEAF:
            await server.is_ready()
        else:
            assert (await server.get("/health")).status == 503
        os.kill(os.getpid(), signal.SIGTERM)
        began = time.monotonic()
        assert await server.end() == 0
        assert time.monotonic() - began < 10

    asyncio.run(life(LOADING, 20))
    asyncio.run(life(DEAF, 0.5))
    said = capfd.readouterr().err
    assert said.count("can use the model: there is no key; give --api-key-file") == 2


def test_the_job_ends_by_itself(start, capfd: pytest.CaptureFixture[str]) -> None:
    """With a mistake, before it is ready; afterwards see test_surviving.py."""

    async def refused() -> None:
        server = start(REFUSING, "--ranks", "2")
        assert await server.life == 2

    asyncio.run(refused())
    said = capfd.readouterr().err
    assert said.count("\nmlxtp.serve: error: no model\n") == 1
    assert len(said.splitlines()) == 3

    async def outlived() -> None:
        """By a rank 0 that keeps its end of the connection."""
        ranks = Ranks()
        folder = await ranks.listen()
        socket_name = folder / messages.SOCKET_NAME
        hello = messages.Hello((folder / messages.KEY_NAME).read_text())
        reader, writer = await asyncio.open_unix_connection(socket_name)
        writer.write(messages.encoded(hello))
        while ranks.state == "starting":
            await asyncio.sleep(0.01)
        ranks.lost("mpirun was killed")
        assert await asyncio.wait_for(reader.read(), 5) == b""
        await ranks.close()

    asyncio.run(outlived())


def test_with_mpirun(start, capfd: pytest.CaptureFixture[str]) -> None:
    """Its line is printed, without the key, and all ranks end."""

    async def life() -> None:
        server = start(FAKE, "--ranks", "2", "--host", "0.0.0.0", "--api-key", "secret")
        await server.ranks(2)
        await server.is_ready()
        os.kill(os.getpid(), signal.SIGHUP)
        assert await server.end() == 0

    asyncio.run(life())
    said = capfd.readouterr().err
    line, listening, *_ = said.splitlines()
    assert "/mpirun --prefix " in line and f" -x {FOLDER_VARIABLE} " in line
    assert listening.endswith("loading stories on 2 ranks")
    assert "secret" not in said and "WARNING" not in said
