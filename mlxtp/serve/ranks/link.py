"""Rank 0's end of the socket to the front."""

import os
import queue
import shutil
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlxtp.comm.errors import UsageError
from mlxtp.serve import messages
from mlxtp.serve.messages import Answer, Call, End, Message


class Link:
    """Hear the front and tell it things.

    A thread takes in what comes. Calls are answered in another one, by the methods of
    `callee`, once that is set; everything else waits in `received`. When the front is
    gone an `End` does; before `callee` is set, while nobody looks, the process ends.
    """

    def __init__(self, folder: Path) -> None:
        """Connect to the front that has made `folder`.

        Raises: OSError if there is none.
        """
        self.callee: Any = None
        self.received: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._folder = folder
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(folder / messages.SOCKET_NAME))
        self._sending = threading.Lock()
        self._answering = ThreadPoolExecutor(1, "text")
        self.send(messages.Hello((folder / messages.KEY_NAME).read_text()))
        threading.Thread(target=self._hear, name="front", daemon=True).start()

    @classmethod
    def of_environment(cls) -> "Link":
        """Connect to the front that started this job.

        Raises: UsageError if none did, or it is gone.
        """
        folder = os.environ.get(messages.FOLDER_VARIABLE)
        if not folder:
            raise UsageError(
                "this is the job of a server, which python -m mlxtp.serve starts"
            )
        try:
            return cls(Path(folder))
        except OSError as error:
            raise UsageError(
                f"the server that started this job is gone: {error}"
            ) from error

    def send(self, message: Message) -> None:
        """Tell the front something; nothing happens if it is gone."""
        self._write(messages.encoded(message))

    def take(self, *, wait: bool) -> list[Message]:
        """Return what has come; with `wait` there is at least one."""
        taken = [self.received.get()] if wait else []
        while True:
            try:
                taken.append(self.received.get_nowait())
            except queue.Empty:
                return taken

    def _hear(self) -> None:
        with suppress(OSError, ValueError), self._socket.makefile("rb") as file:
            for line in file:
                message = messages.decoded(line)
                if isinstance(message, Call):
                    self._answering.submit(self._answer, message)
                else:
                    self.received.put(message)
        # Of a front that was killed nobody else would remove the folder. One that
        # only waits for the next job keeps it.
        if not self._is_there():
            shutil.rmtree(self._folder, ignore_errors=True)
            if self.callee is None:  # these ranks load, for nobody
                os._exit(1)
        self.received.put(End())

    def _is_there(self) -> bool:
        """Whether the front still listens."""
        with suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(self._folder / messages.SOCKET_NAME))
            return True
        return False

    def _answer(self, call: Call) -> None:
        try:
            result = getattr(self.callee, call.name)(**call.arguments)
            line = messages.encoded(Answer(call.call, result))
            if len(line) > messages.LONGEST_ANSWER:
                raise ValueError(
                    f"the result has {len(line) >> 20} MiB of JSON; at most "
                    f"{messages.LONGEST_ANSWER >> 20} are given"
                )
        except ValueError as error:
            line = messages.encoded(Answer(call.call, error=str(error)))
        except Exception as error:  # what a template or a tokenizer may raise
            words = f"{type(error).__name__}: {error}"
            line = messages.encoded(Answer(call.call, error=words))
        self._write(line)

    def _write(self, line: bytes) -> None:
        with self._sending, suppress(OSError):
            self._socket.sendall(line)
