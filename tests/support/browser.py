"""Chromium without a window, driven over a pipe by the DevTools protocol.

Messages are JSON that ends with a zero byte: commands at the browser's descriptor 3,
answers and events at its descriptor 4.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import tempfile
import time
from contextlib import suppress
from pathlib import Path

LIMIT_SECONDS = 20
OPTIONS = [
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",  # root has none, and the pages are ours
    "--no-first-run",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
]
KEYS = {"Enter": 13, "Escape": 27, "Tab": 9}


class Browser:
    """A browser with a profile of its own; close it."""

    def __init__(self):
        self._profile = tempfile.mkdtemp(prefix="chromium-")
        ours_in, its_out = os.pipe()
        its_in, ours_out = os.pipe()
        # Its ends lie above 4, so that one does not take the other's place.
        its_in, its_out = (
            fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (its_in, its_out)
        )
        path = shutil.which("chromium")
        self._process = os.posix_spawn(
            path,
            [path, *OPTIONS, f"--user-data-dir={self._profile}", "about:blank"],
            {**os.environ, "HOME": self._profile},
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
                (os.POSIX_SPAWN_DUP2, its_in, 3),
                (os.POSIX_SPAWN_DUP2, its_out, 4),
            ],
            setpgroup=0,
        )
        os.close(its_in)
        os.close(its_out)
        self._in, self._out = ours_in, ours_out
        self._rest = b""
        self._number = 0
        self.events = []

    def command(self, method, session=None, **parameters):
        """Send a command, and give what it returns."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + LIMIT_SECONDS
        while True:
            answer = self._read(end)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self.events.append(answer)

    def wait(self, session, method, known):
        """Wait for an event of a page that is not among the first `known` ones."""
        end = time.monotonic() + LIMIT_SECONDS
        while not any(
            event.get("sessionId") == session and event["method"] == method
            for event in self.events[known:]
        ):
            self.events.append(self._read(end))

    def _read(self, end):
        while b"\0" not in self._rest:
            if not select.select([self._in], [], [], max(0, end - time.monotonic()))[0]:
                raise TimeoutError("the browser does not answer")
            data = os.read(self._in, 1 << 20)
            if not data:
                raise EOFError("the browser has gone")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\0")
        return json.loads(line)

    def close(self):
        """End the browser, and remove its profile."""
        with suppress(EOFError, OSError, TimeoutError):
            self.command("Browser.close")
        with suppress(ProcessLookupError):
            os.killpg(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)
        os.close(self._in)
        os.close(self._out)
        shutil.rmtree(self._profile, ignore_errors=True)


class Tab:
    """A page with storage of its own."""

    def __init__(self, browser, address, width=1280, height=800, is_dark=False):
        self._browser = browser
        context = browser.command("Target.createBrowserContext")["browserContextId"]
        target = browser.command(
            "Target.createTarget", url="about:blank", browserContextId=context
        )["targetId"]
        self._session = browser.command(
            "Target.attachToTarget", targetId=target, flatten=True
        )["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.command(f"{domain}.enable")
        self.resize(width, height, is_dark)
        self._load("Page.navigate", url=address)

    def command(self, method, **parameters):
        """Send a command of this page, and give what it returns."""
        return self._browser.command(method, session=self._session, **parameters)

    def reload(self):
        """Load the page again."""
        self._load("Page.reload")

    def _load(self, method, **parameters):
        known = len(self._browser.events)
        self.command(method, **parameters)
        self._browser.wait(self._session, "Page.loadEventFired", known)

    def resize(self, width, height, is_dark=False):
        """Be a screen of this size; a narrow one is a phone's."""
        is_phone = width < 600
        self.command(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if is_phone else 1,
            mobile=is_phone,
        )
        self.command("Emulation.setTouchEmulationEnabled", enabled=is_phone)
        scheme = "dark" if is_dark else "light"
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.command("Emulation.setEmulatedMedia", features=features)

    def evaluate(self, expression):
        """Give the value of a JavaScript expression, awaited."""
        done = self.command(
            "Runtime.evaluate",
            expression=expression,
            awaitPromise=True,
            returnByValue=True,
        )
        if "exceptionDetails" in done:
            raise RuntimeError(done["exceptionDetails"]["exception"]["description"])
        return done["result"].get("value")

    def wait(self, expression):
        """Wait until an expression is true, and give its value."""
        end = time.monotonic() + LIMIT_SECONDS
        while not (value := self.evaluate(expression)):
            if time.monotonic() > end:
                seen = self.evaluate("document.body.innerText")
                raise TimeoutError(f"never true: {expression}\n{seen}")
            time.sleep(0.02)
        return value

    def click(self, selector):
        """Press the first element of a selector with the mouse."""
        x, y = self.wait(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "if (!e) return null; e.scrollIntoView({block: 'nearest'});"
            "const b = e.getBoundingClientRect();"
            "return b.width ? [b.x + b.width / 2, b.y + b.height / 2] : null; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.command(
                "Input.dispatchMouseEvent",
                type=kind,
                x=x,
                y=y,
                button="left",
                clickCount=1,
            )

    def write(self, text):
        """Write into what has the focus."""
        self.command("Input.insertText", text=text)

    def press(self, key, *, shift=False):
        """Press a key."""
        of_both = {
            "key": key,
            "code": key,
            "windowsVirtualKeyCode": KEYS[key],
            "modifiers": 8 if shift else 0,
        }
        text = {"text": "\r"} if key == "Enter" else {}
        self.command("Input.dispatchKeyEvent", type="keyDown", **of_both, **text)
        self.command("Input.dispatchKeyEvent", type="keyUp", **of_both)

    def screenshot(self, path):
        """Write what is seen as PNG."""
        data = self.command("Page.captureScreenshot")["data"]
        Path(path).write_bytes(base64.b64decode(data))

    def complaints(self):
        """What the page has written to the console as an error, or raised."""
        texts = []
        for event in self._browser.events:
            if event.get("sessionId") != self._session:
                continue
            parameters = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                details = parameters["exceptionDetails"]
                texts.append(details["exception"].get("description", str(details)))
            if (
                event["method"] == "Log.entryAdded"
                and parameters["entry"]["level"] == "error"
            ):
                texts.append(parameters["entry"]["text"])
        return texts
