"What a newcomer types wrong is told before the script is run."
from __future__ import annotations

import json
from pathlib import Path

import pytest

from fsdl_devinfra.cli import main


@pytest.mark.parametrize(("args", "says"), [(("-o", "gone/report.html", "--", "train.py"), ("no folder", "Make it first")), (("--", "torchrun", "train.py"), ("no script torchrun", "--gpus N")),
                                            (("--", "python3.11", "train.py"), ("no script python3.11", "script itself")), (("--", "other.py"), ("no script other.py", "Check the path"))])
def test_told_before_the_script_runs(tmp_path: Path, args: tuple[str, ...], says: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text("print('it ran')\nraise SystemExit(3)\n")
    status = main(["dryrun", "--json", *args])
    document = json.loads(capsys.readouterr().out)
    assert status == 2 and says[0] in document["error"] and says[1] in document["hint"], document
