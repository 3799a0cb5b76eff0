"""The page in Streamlit's own harness and in a real browser: what a user does, and what goes wrong."""
from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
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
    assert not app.exception and (app.success or app.warning)[0].value != first  # a run of more than a year is not shown in green
    assert app.dataframe[0].value["strategy"].size > 1
    app.number_input(key="gpus").set_value(1).run()
    app.selectbox(key="model").select("Llama 3.1 405B").run()
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
def test_files_that_were_asked_for_stay(app):
    """Streamlit runs the page again for many reasons; the files are gone only when another launcher is chosen."""
    def offered(): return [button.proto.label for button in app.get("download_button")]
    app.button(key="make").click().run()
    assert offered() == ["plan.json", "torchrun.zip"]
    app.run()
    assert offered() == ["plan.json", "torchrun.zip"]
    app.selectbox(key="target").select("slurm").run()
    assert offered() == ["plan.json"]


@pytest.mark.slow
def test_one_configuration_and_serving(app):
    """Any model by name: QLoRA fits where full training does not, and a shorter context lets more requests in."""
    app.radio(key="question").set_value("Fit one configuration").run()
    app.selectbox(key="model").select("llama-3.1-8b").run()
    app.selectbox(key="gpu").select("RTX-4090-24GB").run()
    app.selectbox(key="method").select("full").run()
    assert not app.exception and "does not fit" in app.error[0].value
    assert "--base-weights nf4" in "".join(m.value for m in app.markdown)
    app.selectbox(key="method").select("qlora").run()
    assert not app.exception and "It fits" in app.success[0].value and "between" in app.success[0].value
    app.radio(key="question").set_value("Serve").run()
    assert not app.exception and "fit at once" in app.info[0].value


@pytest.mark.slow
def test_an_address_fills_the_form_and_a_mistake_in_it_is_said():
    def opened(**address):
        app = testing.AppTest.from_function(_page, default_timeout=60)
        for name, value in address.items(): app.query_params[name] = value
        return app.run()
    app = opened(use="train", model="Qwen/Qwen3-8B", gpu="A100-SXM-80GB", method="lora")
    assert not app.exception and "Qwen3-8B" in app.success[0].value and "A100-SXM-80GB" in app.success[0].value
    assert app.selectbox(key="method").value == "lora" and "Qwen/Qwen3-8B" in str(app.query_params["model"])
    unknown = opened(use="train", model="no-such-model")
    assert not unknown.exception and "no-such-model" in unknown.error[0].value


@pytest.mark.slow
def test_a_wrong_address_is_said():
    """A shared link that the form cannot show is not quietly answered with something else."""
    def opened(**address):
        app = testing.AppTest.from_function(_page, default_timeout=60)
        for name, value in address.items(): app.query_params[name] = value
        return app.run()
    app = opened(use="train", gpu="h1000", gpus="two")
    assert not app.exception and app.success and [w.value.split(",")[0] for w in app.warning] == ["The address says gpu=h1000", "The address says gpus=two"]
    app.selectbox(key="method").select("lora").run()
    assert not any("The address" in w.value for w in app.warning)  # the address was put right
    right = opened(use="train", gpu="H100-SXM-80GB", gpus="2")
    assert not right.warning and right.title[0].value != opened(use="serve").title[0].value
    assert "The address says use=eat" in opened(use="eat").warning[0].value


@pytest.mark.slow
def test_two_configurations_are_compared(app):
    app.radio(key="question").set_value("Fit one configuration").run()
    app.button(key="keep").click().run()
    app.selectbox(key="method").select("full").run()
    assert not app.exception and len(app.success) == 1 and len(app.error) == 1  # QLoRA was kept, full training does not fit beside it
    app.button(key="drop").click().run()
    assert not app.exception and not app.success and len(app.error) == 1


@pytest.mark.slow
def test_the_script_that_streamlit_runs():
    from pathlib import Path
    import fsdl_devinfra.launch.app_page as script
    ran = testing.AppTest.from_file(str(Path(script.__file__)), default_timeout=60).run()
    assert not ran.exception and ran.title[0].value.startswith("Which GPU")


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
    browser.click("Generate launch files")
    assert "torchrun.zip" in browser.wait("torchrun.zip")
    assert len(browser.picture(tmp_path)) > 20_000
