"""Serve a model on all ranks: `python -m mlxtp.serve`.

This process is the front, which clients talk to: it imports neither MLX nor MPI. It
starts the job of the ranks, and ends it. The whole life of a server, from top to
bottom.
"""

import argparse
import asyncio
import contextlib
import ipaddress
import logging
import socket
import sys
from dataclasses import replace
from pathlib import Path

import uvicorn

from mlxtp.cluster.allocation import Allocation, allocation
from mlxtp.cluster.job import JobError
from mlxtp.comm import launcher
from mlxtp.comm.errors import UsageError
from mlxtp.serve import options
from mlxtp.serve.front.app import create_app
from mlxtp.serve.front.config import Config
from mlxtp.serve.front.connections import Connection, raise_open_files
from mlxtp.serve.front.journal import Journal, default_folder
from mlxtp.serve.front.ranks import Ranks
from mlxtp.serve.hosts import check_first_host
from mlxtp.serve.log import say
from mlxtp.serve.supervisor import Future, first_of, signals, supervised

# At the end, how long clients may take to read the rest of their answers.
LAST_READ_SECONDS = 2

# How often it is looked whether all requests have ended.
POLL_SECONDS = 0.05


def main() -> None:
    """Check the command line, start the ranks and serve until a signal comes.

    The status is 0 after a signal, 2 for a mistake of the person who started it, and
    the last job's where no other follows: never 2 once the server was ready.
    """
    try:
        # What the front logs stands beside what `say` prints.
        logging.basicConfig(format="mlxtp.serve: %(message)s")
        logging.getLogger("mlxtp").setLevel(logging.INFO)
        args = options.parse(sys.argv[1:])
        given = allocation() if args.hostfile is None else None
        check_first_host(args.hostfile, given)
        raise_open_files()
        with listen(args.host, args.port) as listener:
            config = options.config(args, listener.getsockname()[1])
            status = asyncio.run(serve(args, config, listener, given))
    except (UsageError, JobError) as error:
        launcher.refuse("mlxtp.serve", error)
    sys.exit(status)


def listen(host: str, port: int) -> socket.socket:
    """Listen on an address, so that the port is known to be free before ranks start.

    Raises: UsageError if that is not possible.
    """
    with contextlib.ExitStack() as stack:
        try:
            family, *_, address = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM
            )[0]
            listener = stack.enter_context(socket.socket(family))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # Connections have it too: those of machines that vanished end some day.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            listener.bind(address)
            listener.listen()
        except (OSError, UnicodeError) as error:  # the latter for what is no name
            reason = getattr(error, "strerror", None) or str(error)
            raise UsageError(
                f"cannot listen on {host} port {port}: {reason}: give another --port "
                "or --host"
            ) from None
        stack.pop_all()
    return listener


async def serve(
    args: argparse.Namespace,
    config: Config,
    listener: socket.socket,
    given: Allocation | None,
) -> int:
    """Start the ranks and the front, and end them; return the exit status.

    It lasts until a signal, or until the ranks have ended and do not go on. Nothing is
    left behind: no process, no folder, no socket.

    Raises: JobError where there is no mpirun, or for a wrong number of ranks.
    """
    name = config.model_names[0]
    with signals() as (first, second):
        async with Ranks() as ranks:
            front = Front(ranks, replace(config, journal=journal(args, ranks)))
            async with supervised(args, given, ranks, name, second) as supervising:
                serving = asyncio.create_task(front.serve([listener]))
                say(f"{url(listener)}, loading {name} {where(args, given)}")
                if not (config.api_keys or is_loopback(listener)):
                    say(
                        f"WARNING: whoever reaches {url(listener)} can use the model: "
                        "there is no key; give --api-key-file FILE"
                    )
                await first_of(first, supervising, serving)
                if first.done():
                    await drain(front, ranks, config.drain_seconds, second, supervising)
                    status = 0
                elif serving.done():
                    raise RuntimeError("the front has ended") from serving.exception()
                else:
                    status = supervising.result()
                front.should_exit = True
            await serving
        return status


def journal(args: argparse.Namespace, ranks: Ranks) -> Journal | None:
    """Open the journal of requests.

    Raises: UsageError if there can be none where --journal-dir says.
    """
    if args.no_journal:
        return None
    given = args.journal_dir
    try:
        folder = Path(given) if given else default_folder()
        return Journal(folder, ranks, f"{args.model} {args.adapter_path}")
    except OSError as error:
        if given:
            raise UsageError(f"--journal-dir {given}: {error.strerror}") from None
        say(f"no journal of requests is kept: {error}")
        return None


class Front(uvicorn.Server):
    """uvicorn with limits of ours; the signals are not its own."""

    def __init__(self, ranks: Ranks, config: Config) -> None:
        super().__init__(
            uvicorn.Config(
                create_app(ranks, config),
                http=Connection,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=LAST_READ_SECONDS,
            )
        )

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        """Leave signals to `serve`."""
        return contextlib.nullcontext()

    def is_busy(self) -> bool:
        """Whether requests are under way."""
        return bool(self.server_state.tasks)


async def drain(
    front: Front,
    ranks: Ranks,
    seconds: float,
    second: Future,
    supervising: Future,
) -> None:
    """Take no more requests, and let those end that are under way.

    For so many seconds at most, until a second signal, or until no ranks
    are to come.
    """
    ranks.is_draining = True
    if ranks.state == "ready":
        ranks.state = "draining"
    until = asyncio.get_running_loop().time() + seconds
    if front.is_busy():
        say(f"ends when the requests under way have ended, in {seconds:g} s at most")
    while front.is_busy() and not (second.done() or supervising.done()):
        if asyncio.get_running_loop().time() > until:
            return
        await asyncio.sleep(POLL_SECONDS)


def where(args: argparse.Namespace, given: Allocation | None) -> str:
    """Say on which ranks the model is."""
    count = "one rank" if args.ranks == 1 else f"{args.ranks} ranks"
    on_ranks = "the ranks" if args.ranks is None else count
    if args.hostfile is not None:
        return f"on {on_ranks} of {args.hostfile}"
    if given is not None:
        return f"on {on_ranks} of {given.system}'s hosts {', '.join(given.hosts)}"
    if args.ranks is None:
        return "on one rank; --ranks N or --hostfile HOSTFILE starts more"
    return f"on {on_ranks}"


def url(listener: socket.socket) -> str:
    """Return the address that clients take."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(listener: socket.socket) -> bool:
    """Whether programs on this machine alone can connect."""
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


if __name__ == "__main__":
    main()
