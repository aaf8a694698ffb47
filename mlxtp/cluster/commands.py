"""What the commands of a system print."""

import subprocess


def output(*command: str) -> str:
    """Run a command and return what it prints; "" where it is missing or too slow."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout
