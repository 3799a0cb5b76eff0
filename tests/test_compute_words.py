"The words of `cost` agree with its numbers."
import json
import shlex

import pytest

from fsdl_devinfra.cli import main
from fsdl_devinfra.compute.money import breakeven
from fsdl_devinfra.core.errors import BadInput


def said(line, capsys):
    status = main(shlex.split(line))
    return status, capsys.readouterr().out


def test_kinds_of_communication_are_called_by_their_names(capsys):
    status, text = said("cost llama-3.1-8b --gpu h100 --dp 4 --tp 2 --zero 3", capsys)
    assert status == 0 and "data-parallel communication" in text and "tensor, expert and context parallelism" in text
    assert "matmuls" in text and "products" not in text


def test_a_share_of_a_step_is_never_zero_milliseconds(capsys):
    _, text = said("cost bert-base-uncased --gpu h100", capsys)
    rows = [line.split() for line in text.splitlines() if line.endswith("%")]
    assert rows and all(float(row[-3]) > 0 for row in rows if row[-2] == "ms")


def test_a_machine_that_never_works_is_no_question():
    with pytest.raises(BadInput, match="never works"): breakeven(60000, 8, 2.0, watts=6500, utilisation=0)
    assert breakeven(60000, 8, 2.0, watts=6500, utilisation=0.01).owned_usd_per_gpu_hour > 1


def test_a_run_that_does_not_fit_is_not_said_to_fit_elsewhere(capsys):
    status, text = said("cost llama-3.1-8b --gpu V100-SXM-16GB", capsys)
    assert status == 1 and "does not fit" in text.splitlines()[0] and "What fits" not in text
    assert main(["plan", "llama-3.1-8b", "--gpu", "V100-SXM-16GB", "--gpus", "1", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["best"] is None


@pytest.mark.parametrize("spoiled", [{"plans": {"a": 1}}, {"plans": 5}, {"plans": [{"hours": "soon"}]}])
def test_a_plan_that_was_edited_by_hand_is_a_user_error(spoiled, tmp_path, capsys):
    path = tmp_path / "plan.json"
    assert main(["plan", "llama-3.1-8b", "--gpu", "h100", "--gpus", "8", "--dp", "8", "-o", str(path)]) == 0
    assert main(["launch", str(path), "--to", "slurm"]) == 0
    document = json.loads(path.read_text())
    if isinstance(spoiled["plans"], list): spoiled = {"plans": [document["plans"][0] | spoiled["plans"][0]]}
    path.write_text(json.dumps(document | spoiled))
    capsys.readouterr()
    assert main(["launch", str(path), "--to", "slurm", "--json"]) == 2
    assert "unexpected" not in json.loads(capsys.readouterr().out)["error"]


def test_machines_are_compared_without_looking_for_remedies(monkeypatch):
    from fsdl_devinfra.compute import planner
    from fsdl_devinfra.memory import serving
    looked = []
    monkeypatch.setattr(serving, "_remedies", lambda *a: looked.append(a) or ["one"])
    address = "use=serve&model=llama-3.1-70b&gpu=RTX-3090-24GB"
    assert planner.machines(address) is not None and len(looked) == 0
    assert planner.remedies(address) == ["one"] and len(looked) == 1
