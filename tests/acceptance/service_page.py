"""The page of a service in headless Chromium (Debian's package chromium).

    python -m tests.acceptance.service_page --url=http://127.0.0.1:8000 --out=DIR

Presses the button, in light and in dark, and then asks for too many steps. Exit code 0 only if the
picture came stage by stage with its milliseconds, the error was shown and nothing else was asked
of any other address. DIR has screenshots after the first stage, at the end and of the error.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PRESS = """
    document.getElementById("class").value = "3";
    document.getElementById("seed").value = "1";
    document.getElementById("sample").click()
"""
TOO_MANY = """
    document.getElementById("steps").removeAttribute("max");
    document.getElementById("steps").value = "900";
    document.getElementById("sample").click()
"""
STATUS = 'document.getElementById("status")?.textContent'
DONE = 'document.querySelectorAll(".stage.done").length'
STAGES = 'document.querySelectorAll(".stage").length'
TIMES = '[...document.querySelectorAll(".time")].map((time) => time.textContent)'
LOADED = 'performance.getEntriesByType("resource").map((entry) => entry.name)'


class Browser:
    """Chromium by its debugging pipe: it reads commands from descriptor 3, answers on 4."""

    def __init__(self) -> None:
        theirs, self.commands = os.pipe()
        self.answers, answering = os.pipe()
        line = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        shell = f'exec "$@" 3<&{theirs} 4>&{answering}'
        self.process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *line, "--remote-debugging-pipe"],
            pass_fds=(theirs, answering),
            stderr=subprocess.DEVNULL,
        )
        self.read, self.number, self.session = b"", 0, {}
        page = self.call("Target.createTarget", url="about:blank", width=1100, height=860)
        target = {"targetId": page["targetId"], "flatten": True}
        self.session = {"sessionId": self.call("Target.attachToTarget", **target)["sessionId"]}

    def open(self, url: str, scheme: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.call("Page.navigate", url=url)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params, **self.session}
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.read:
                piece = os.read(self.answers, 1 << 20)
                if not piece:
                    raise SystemExit("chromium went away")
                self.read += piece
            text, _, self.read = self.read.partition(b"\0")
            answer = json.loads(text)
            if answer.get("id") == self.number:
                return answer["result"]

    def value(self, script: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        return answer["result"].get("value")

    def until(self, script: str, seconds: float = 300) -> None:
        end = time.monotonic() + seconds
        while not self.value(script):
            if time.monotonic() > end:
                raise SystemExit(f"not reached: {script}; the page says {self.value(STATUS)!r}")
            time.sleep(0.05)

    def screenshot(self, path: Path) -> None:
        answer = self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(answer["data"]))
        print(path, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    browser = Browser()
    for scheme in ("light", "dark"):
        browser.open(args.url, scheme)
        browser.until(f'{STATUS} === "Ready"')
        browser.value(PRESS)
        browser.until(f"{DONE} === 1")
        browser.screenshot(args.out / f"{scheme}_first_stage.png")
        browser.until(f"{DONE} === {STAGES} && !document.getElementById('sample').disabled")
        browser.screenshot(args.out / f"{scheme}_done.png")
        print(browser.value(STATUS), browser.value(TIMES), flush=True)
        if not all(text.endswith(" ms") for text in browser.value(TIMES)):
            raise SystemExit("stages without milliseconds")
        browser.value(TOO_MANY)
        browser.until('document.getElementById("status").className === "bad"')
        browser.screenshot(args.out / f"{scheme}_error.png")
        print(browser.value(STATUS), flush=True)
        if foreign := [
            name for name in browser.value(LOADED) if not name.startswith((args.url, "data:"))
        ]:
            raise SystemExit(f"asked elsewhere: {foreign}")
    browser.call("Browser.close")
    return browser.process.wait(30)


if __name__ == "__main__":
    sys.exit(main())
