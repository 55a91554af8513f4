"""A headless Chromium driven over a pipe by the DevTools protocol, for tests of pages.

    python -m tests.browser REPORT.html picture.png 380 dark      a picture of the whole page

https://chromedevtools.github.io/devtools-protocol/
"""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
WAIT_S = 60


def chromium() -> str | None:
    """The browser of this machine; None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One browser with a new, empty profile."""

    def __init__(self, program: str):
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        theirs_in, self.out = os.pipe()
        self.incoming, theirs_out = os.pipe()
        # It reads commands from 3 and writes to 4.
        line = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self.process = subprocess.Popen(
            [
                "bash",
                "-c",
                line,
                program,
                *FLAGS,
                f"--user-data-dir={self.profile.name}",
                "about:blank",
            ],
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.buffer, self.number, self.events = b"", 0, []

    def _message(self) -> dict:
        while b"\0" not in self.buffer:
            assert select.select([self.incoming], [], [], WAIT_S)[0], "the browser does not answer"
            part = os.read(self.incoming, 2**20)
            assert part, f"the browser has ended: {self.process.wait(5)}"
            self.buffer += part
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def command(self, method: str, session: str | None = None, **parameters) -> dict:
        """The result of a command; events that come meanwhile are kept."""
        self.number += 1
        asked = {"id": self.number, "method": method, "params": parameters}
        os.write(
            self.out,
            json.dumps({**asked, "sessionId": session} if session else asked).encode() + b"\0",
        )
        while True:
            message = self._message()
            if message.get("id") == self.number:
                assert "error" not in message, (method, message)
                return message["result"]
            self.events.append(message)

    def open(
        self, page: Path, width: int = 1200, dark: bool = False, script: bool = True
    ) -> "Page":
        return Page(self, page, width, dark, script)

    def close(self) -> None:
        os.close(self.out)
        os.close(self.incoming)
        self.process.kill()
        self.process.wait()
        self.profile.cleanup()


class Page:
    """One tab. Errors and requests are those since it was opened."""

    def __init__(self, browser: Browser, path: Path, width: int, dark: bool, script: bool):
        self.browser = browser
        target = browser.command("Target.createTarget", url="about:blank")["targetId"]
        self.session = browser.command("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.command(f"{domain}.enable")
        self.command(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.command("Emulation.setEmulatedMedia", features=[scheme])
        if not script:
            self.command("Emulation.setScriptExecutionDisabled", value=True)
        self.command("Page.navigate", url=path.resolve().as_uri())
        while not self.events("Page.loadEventFired"):
            browser.events.append(browser._message())

    def command(self, method: str, **parameters) -> dict:
        return self.browser.command(method, self.session, **parameters)

    def events(self, *methods: str) -> list[dict]:
        return [
            event["params"]
            for event in self.browser.events
            if event.get("sessionId") == self.session and event["method"] in methods
        ]

    def value(self, expression: str):
        """The value of a JavaScript expression in the page."""
        found = self.command("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def troubles(self) -> list[dict]:
        """Errors and warnings on the console, exceptions, and what the content policy forbade."""
        entries = [event["entry"] for event in self.events("Log.entryAdded")]
        calls = self.events("Runtime.exceptionThrown", "Runtime.consoleAPICalled")
        return [entry for entry in entries if entry["level"] != "verbose"] + calls

    def requests(self) -> list[str]:
        return [event["request"]["url"] for event in self.events("Network.requestWillBeSent")]

    def press(self, key: str) -> None:
        codes = {"Tab": 9, "ArrowRight": 39, "ArrowLeft": 37, "Enter": 13}
        for kind in ("keyDown", "keyUp"):
            self.command(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=codes[key],
            )

    def picture(self, path: Path) -> None:
        shot = self.command("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))


def main() -> None:
    page, picture, width, *more = sys.argv[1:]
    browser = Browser(chromium() or sys.exit("no Chromium here"))
    tab = browser.open(Path(page), int(width), "dark" in more)
    for expression in (word for word in more if word != "dark"):
        tab.value(expression)
    size = tab.command("Page.getLayoutMetrics")["cssContentSize"]
    clip = {"x": 0, "y": 0, "width": int(width), "height": min(size["height"], 16_000), "scale": 1}
    shot = tab.command("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
    Path(picture).write_bytes(base64.b64decode(shot["data"]))
    print(size, tab.troubles(), [url[:60] for url in tab.requests() if not url.startswith("data:")])
    browser.close()


if __name__ == "__main__":
    main()
