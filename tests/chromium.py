"""Chromium for tests, driven over its debugging port; skipped where there is none."""
from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import threading
import time
import urllib.request

import pytest


class Browser:
    """Chromium without a window, driven over its debugging port."""

    def __init__(self, program: str, folder):
        import websockets.sync.client as client
        line = [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--window-size=1400,1900", f"--user-data-dir={folder}", "--remote-debugging-port=0", "about:blank"]
        self.process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        self.log, said = threading.Thread(target=self._read, daemon=True), time.monotonic()
        self.port, self.count = None, 0
        self.log.start()
        while self.port is None:
            if time.monotonic() - said > 60 or self.process.poll() is not None: pytest.skip("Chromium does not start here")
            time.sleep(0.1)
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/json", timeout=20) as answer: pages = json.load(answer)
        self.socket = client.connect(next(p for p in pages if p["type"] == "page")["webSocketDebuggerUrl"], max_size=None).__enter__()

    def _read(self) -> None:
        for line in self.process.stderr:  # to the end: a full pipe would stop it
            found = re.search(r"ws://127\.0\.0\.1:(\d+)/", line)
            if found: self.port = found[1]

    def call(self, method: str, **params) -> dict:
        self.count += 1
        self.socket.send(json.dumps({"id": self.count, "method": method, "params": params}))
        while True:
            answer = json.loads(self.socket.recv(timeout=60))
            if answer.get("id") == self.count: return answer.get("result", answer)

    def text(self) -> str: return self.call("Runtime.evaluate", expression="document.body.innerText")["result"].get("value") or ""

    def click(self, label: str, limit: float = 60.0) -> None:
        """Press the button that bears a label, as soon as there is one: Streamlit puts labels in after the buttons."""
        pressed = f"(b => (b?.click(), !!b))([...document.querySelectorAll('button')].find(b => b.innerText.trim() === {json.dumps(label)}))"
        deadline = time.monotonic() + limit
        while not self.call("Runtime.evaluate", expression=pressed)["result"]["value"]:
            assert time.monotonic() < deadline, f"no button {label!r} in: {self.text()[:2000]}"
            time.sleep(0.3)

    def wait(self, *words: str, limit: float = 90.0) -> str:
        deadline = time.monotonic() + limit
        while not all(w in (seen := self.text()) for w in words):
            assert time.monotonic() < deadline, f"no {words} in: {seen[:2000]}"
            time.sleep(0.3)
        return seen

    def picture(self, folder) -> bytes:
        data = base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        (folder / "page.png").write_bytes(data)
        return data

    def close(self) -> None:
        self.process.terminate()
        try: self.process.wait(15)
        except subprocess.TimeoutExpired: self.process.kill()


@pytest.fixture
def browser(tmp_path):
    program = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
    if program is None: pytest.skip("no Chromium: on Debian, apt install chromium")
    pytest.importorskip("websockets.sync.client")
    b = Browser(program, tmp_path / "profile")
    yield b
    b.close()
