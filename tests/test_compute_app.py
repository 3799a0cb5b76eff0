"""The page in Streamlit's own harness: what a user does, and what goes wrong."""
from __future__ import annotations

import pytest

testing = pytest.importorskip("streamlit.testing.v1")


def _page():
    from fsdl_devinfra.compute.app import page
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
    app.number_input(key="pick").set_value(2).run()
    app.button(key="make").click().run()
    assert not app.exception
    app.text_input(key="tokens").set_value("many").run()
    assert not app.exception and "not a count" in app.error[0].value


@pytest.mark.slow
def test_the_script_that_streamlit_runs():
    from pathlib import Path
    import fsdl_devinfra.compute.app_page as script
    ran = testing.AppTest.from_file(str(Path(script.__file__)), default_timeout=60).run()
    assert not ran.exception and ran.title[0].value.startswith("Which GPU")
