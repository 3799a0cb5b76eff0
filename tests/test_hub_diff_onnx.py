"""`hub diff` of ONNX files: tensors by hash wherever and however they are stored, and the rest of the graph in words. Written by the onnx library."""
from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

onnx = pytest.importorskip("onnx")
np = pytest.importorskip("numpy")

from fsdl_devinfra.hub.comparison import diff
from fsdl_devinfra.hub.server import LoopbackHub


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"layer.w": rng.normal(size=(40, 50)).astype(np.float32), "layer.b": rng.normal(size=50).astype(np.float32), "half": rng.normal(size=6).astype(np.float16),
            "ids": np.array([-3, 0, 2**40], np.int64), "small": np.array([-1, 5], np.int8), "flag": np.array([True, False])}


def typed(name: str, value: np.ndarray):
    """A tensor whose numbers are in a field of their type, not as raw bytes."""
    kind = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
    return onnx.helper.make_tensor(name, kind, value.shape, value.flatten().tolist())


def save(folder: Path, values: dict[str, np.ndarray], stored: str = "raw", op: str = "Identity", name: str = "model.onnx", producer: str = "p") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    make = typed if stored == "typed" else lambda n, v: onnx.numpy_helper.from_array(v, n)
    io = [onnx.helper.make_tensor_value_info(n, 1, [1]) for n in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node(op, ["x"], ["y"])], "g", io[:1], io[1:], [make(n, v) for n, v in values.items()])
    model = onnx.helper.make_model(graph, producer_name=producer)
    if stored == "beside": onnx.save(model, folder / name, save_as_external_data=True, location=name + ".data", size_threshold=0)
    else: onnx.save(model, folder / name)
    return folder


@pytest.mark.parametrize("right", ["raw", "typed", "beside"])
@pytest.mark.parametrize("left", ["raw", "typed", "beside"])
def test_the_same_numbers_are_the_same_however_they_are_stored(tmp_path, left, right):
    one, other = save(tmp_path / "a", weights(), left), save(tmp_path / "b", weights(), right)
    found = diff(one, other)
    assert (found.verdict, found.counts["same"], found.tensors) == ("same", 6, []), found
    for name in weights():  # the control: one number changes, in each tensor
        changed = {n: v.copy() for n, v in weights().items()}
        value = changed[name].reshape(-1)
        value[0] = not value[0] if value.dtype == bool else value[0] + 1
        found = diff(one, save(tmp_path / f"b-{name}", changed, right), full=True)
        assert [(t.name, t.change) for t in found.tensors] == [(name, "changed")] and found.counts["same"] == 5
        assert found.tensors[0].statistics and found.tensors[0].statistics.max_abs_difference == pytest.approx(1, rel=1e-3)


def test_what_the_graph_computes_counts_and_who_made_it_does_not(tmp_path):
    one = save(tmp_path / "a", weights())
    other = diff(one, save(tmp_path / "b", weights(), op="Neg"))
    assert other.verdict == "differs" and [r.what for r in other.documents if r.effect == "model"] == ["the nodes of the graph differ"] and not other.tensors
    made = diff(one, save(tmp_path / "c", weights(), producer="q"))
    assert made.verdict == "same" and [r.effect for r in made.documents] == ["record"]
    assert diff(one, one).verdict == "same"


def test_texts_and_shapes(tmp_path):
    one = save(tmp_path / "a", weights() | {"words": np.array(["a", "b"], object)})
    other = save(tmp_path / "b", weights() | {"words": np.array(["a", "c"], object)})
    assert [(t.name, t.change) for t in diff(one, other).tensors] == [("words", "undecided")]  # not read, so not called the same
    found = diff(one, save(tmp_path / "c", {"layer.w": np.zeros((50, 40), np.float32)}))
    assert {t.name: t.change for t in found.tensors} == {"layer.w": "shape", "layer.b": "removed", "half": "removed", "ids": "removed", "small": "removed", "flag": "removed", "words": "removed"}


def test_another_name_of_the_file(tmp_path):
    found = diff(save(tmp_path / "a", weights()), save(tmp_path / "b", weights(), name="other.onnx"))
    assert found.verdict == "same" and found.counts["same"] == 6


def test_large_tensors_are_hashed_in_pieces(tmp_path):
    big = {"w": np.zeros((2048, 2048), np.float32)}
    one, other = save(tmp_path / "a", big, "beside"), save(tmp_path / "b", big | {"w": big["w"] + np.eye(2048, dtype=np.float32)}, "beside")
    tracemalloc.start()
    found = diff(one, other)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [(t.name, t.change) for t in found.tensors] == [("w", "changed")] and peak < 12 * 2**20, peak


def test_on_a_hub(tmp_path, no_hub, monkeypatch):
    save(tmp_path / "shelf" / "org" / "m", weights())
    changed = weights() | {"layer.b": np.zeros(50, np.float32)}
    here = save(tmp_path / "here", changed, "beside")
    with LoopbackHub(tmp_path / "shelf") as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        found = diff("org/m", here)
    assert [(t.name, t.change) for t in found.tensors] == [("layer.b", "changed")] and "only layer.b changed" in found.summary
