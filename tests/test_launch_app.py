"""The page in Streamlit's own harness and in a real browser: what a user does, and what goes wrong."""
from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest

testing = pytest.importorskip("streamlit.testing.v1")


def _page():
    from fsdl_devinfra.launch.app import page
    page()


@pytest.fixture
def app():
    return testing.AppTest.from_function(_page, default_timeout=60).run()


@pytest.mark.slow
def test_it_plans_and_changes(app):
    assert not app.exception and "Llama 3.1 8B on 8 × H100-SXM-80GB" in app.success[0].value
    first = app.success[0].value
    app.selectbox(key="gpu").select("A100-SXM-80GB").run()
    assert not app.exception and app.success[0].value != first
    assert app.dataframe[0].value["strategy"].size > 1
    app.number_input(key="gpus").set_value(1).run()
    app.selectbox(key="preset").select("Llama 3.1 405B").run()
    assert not app.exception and app.error and not app.success  # nothing fits, said and not raised


@pytest.mark.slow
def test_files_are_made_and_mistakes_said(app):
    app.selectbox(key="target").select("deepspeed").run()
    app.selectbox(key="pick").select(2).run()
    app.button(key="make").click().run()
    assert not app.exception
    app.text_input(key="tokens").set_value("many").run()
    assert not app.exception and "not a count" in app.error[0].value


@pytest.mark.slow
def test_the_script_that_streamlit_runs():
    from pathlib import Path
    import fsdl_devinfra.launch.app_page as script
    ran = testing.AppTest.from_file(str(Path(script.__file__)), default_timeout=60).run()
    assert not ran.exception and ran.title[0].value.startswith("Which GPU")


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

    def click(self, label: str) -> None:
        self.call("Runtime.evaluate", expression=f"[...document.querySelectorAll('button')].find(b => b.innerText.trim() === {json.dumps(label)}).click()")

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
def served(cli):
    """`fsdl-devinfra app` on a free port."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", "fsdl_devinfra", "app", "--port", str(port), "--no-browser"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        for _ in range(600):
            try: urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).close(); break
            except OSError: time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(20)


@pytest.fixture
def browser(tmp_path):
    program = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
    if program is None: pytest.skip("no Chromium: on Debian, apt install chromium")
    pytest.importorskip("websockets.sync.client")
    b = Browser(program, tmp_path / "profile")
    yield b
    b.close()


@pytest.mark.slow
def test_it_works_in_a_real_browser(served, browser, tmp_path):
    """The answer is on the screen, the charts are drawn, files can be made, and nothing is sent to Streamlit's makers."""
    browser.call("Network.enable")
    browser.call("Page.navigate", url=served)
    seen = browser.wait("Llama 3.1 8B on 8 × H100-SXM-80GB", "What to try first", "Ruled out", "Assumptions")
    assert "tokens/s on each GPU" in seen and "in all" in seen and "$" in seen
    assert "Traceback" not in seen and "Deploy" not in seen
    drawn = "[...document.querySelectorAll('main img, section img, [data-testid=stMain] svg, img')].filter(e => e.getBoundingClientRect().width > 200 && (e.naturalWidth ?? 1) > 0).length"
    deadline = time.monotonic() + 30
    while browser.call("Runtime.evaluate", expression=drawn)["result"]["value"] < 3:
        assert time.monotonic() < deadline, "the three charts are not drawn"
        time.sleep(0.3)
    asked = "performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.startsWith(location.origin) && !n.startsWith('data:') && !n.startsWith('blob:'))"
    assert browser.call("Runtime.evaluate", expression=asked, returnByValue=True)["result"]["value"] == []
    browser.click("Make the files")
    assert "torchrun.zip" in browser.wait("torchrun.zip")
    assert len(browser.picture(tmp_path)) > 20_000
