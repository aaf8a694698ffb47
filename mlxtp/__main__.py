"""The command `mlxtp`: `mlxtp NAME ...` is `python -m mlxtp.NAME ...`."""

import runpy
import sys

import mlxtp
from mlxtp.comm import launcher

# Each is a program of its own, in the module of that name.
COMMANDS = {
    "generate": "generate text from one model on all ranks",
    "serve": "serve one model on all ranks, with OpenAI's and Anthropic's interfaces",
    "chat": "talk with a model in the terminal",
    "shard": "cut a checkpoint into the slices of each rank, ahead of time",
    "plan": "what a model needs on some machines, whether it fits, and its speed",
    "doctor": "examine the machines of a cluster and what joins them",
}


def main() -> None:
    """Run the program that the command line names, or say what there is."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in COMMANDS:
        sys.argv[1:] = arguments
        runpy.run_module(f"mlxtp.{name}", run_name="__main__", alter_sys=True)
        return
    known = name in ("--help", "-h", "--version")
    if launcher.rank() == 0:
        if name == "--version":
            print(f"mlxtp {mlxtp.__version__}")
        elif known:
            print(usage())
        else:
            wanted = f"wanted {', '.join(COMMANDS)}"
            print(f"mlxtp: there is no command {name!r}: {wanted}", file=sys.stderr)
    launcher.leave(0 if known else 2)


def usage() -> str:
    """Return what there is, a line for each command."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {does}" for name, does in COMMANDS.items()]
    return "\n".join(
        [
            "usage: mlxtp COMMAND [OPTION ...]; mlxtp --version",
            "",
            *lines,
            "",
            "Each is also python -m mlxtp.COMMAND. Options: mlxtp COMMAND --help",
        ]
    )


if __name__ == "__main__":
    main()
