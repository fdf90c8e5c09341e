"""The rewriting of graphs: attention with its projections in one node, masks, reshapes, names of axes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
from encoders import VOCABULARY, tiny_encoder

from edgedistill.onnx import fusions
from edgedistill.onnx.float_export import FloatExport, export_float
from edgedistill.runtimes.graph import GraphProcess


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> FloatExport:
    folder = tmp_path_factory.mktemp("tokens")
    return export_float(tiny_encoder(folder / "model", "bert-tokens", tokenizer=False), folder / "out")[0]


def feeds_of(lengths: list[int], longest: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    ids = rng.integers(4, VOCABULARY, (len(lengths), longest))
    mask = (np.arange(longest)[None] < np.array(lengths)[:, None]).astype(np.int64)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def test_padding_changes_nothing_of_a_row(tokens: FloatExport) -> None:
    lengths = [9, 4, 1]
    feeds = feeds_of(lengths, 9)
    with GraphProcess(tokens.path, threads=1) as process:
        together = process.run(feeds)["logits"]
        for row, length in enumerate(lengths):
            alone = process.run({name: value[row : row + 1, :length] for name, value in feeds.items()})["logits"]
            np.testing.assert_allclose(together[row, :length], alone[0], atol=2e-5)


def test_attention_packed_with_its_projections_equals_attention_apart(
    tokens: FloatExport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fusions, "_pack_projections", lambda *_: None)
    apart = export_float(tokens.path.parent.parent / "model", tmp_path / "out")[0]
    kinds = {node.op_type for node in onnx.load(str(apart.path)).graph.node}
    assert "MultiHeadAttention" in kinds and "Attention" not in kinds
    feeds = feeds_of([7, 3], 7)
    with GraphProcess(tokens.path, threads=1) as one, GraphProcess(apart.path, threads=1) as other:
        np.testing.assert_allclose(one.run(feeds)["logits"], other.run(feeds)["logits"], atol=2e-5)


def reshapes(last: list[int | str]) -> onnx_ir.Model:
    """x [batch, 6, 4] → [batch, 6, 2, 2] → `last`."""
    x = onnx_ir.Value(name="x", shape=onnx_ir.Shape(["batch", 6, 4]), type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT))
    first = onnx_ir.node("Reshape", [x, onnx_ir.Value(name="s1")])
    first.outputs[0].shape = onnx_ir.Shape(["batch", 6, 2, 2])
    second = onnx_ir.node("Reshape", [first.outputs[0], onnx_ir.Value(name="s2")])
    second.outputs[0].shape = onnx_ir.Shape(last)
    end = onnx_ir.node("Relu", [second.outputs[0]])
    graph = onnx_ir.Graph([x], [end.outputs[0]], nodes=[first, second, end], opset_imports={"": 20})
    return onnx_ir.Model(graph, ir_version=10)


@pytest.mark.parametrize(("last", "kept"), [(["batch", 6, 4], 0), (["batch", 4, 6], 2), (["other", 6, 4], 2)])
def test_only_reshapes_that_change_nothing_are_dropped(last: list[int | str], kept: int) -> None:
    model = reshapes(last)
    fusions.fuse(model)
    assert sum(node.op_type == "Reshape" for node in model.graph) == kept


def test_axes_get_their_names_in_sums_too() -> None:
    past = onnx_ir.Value(name="past", shape=onnx_ir.Shape(["s1", 4, "s22"]))
    new = onnx_ir.Value(name="new", shape=onnx_ir.Shape(["s1", 4, "s2"]))
    node = onnx_ir.node("Concat", [past, new], {"axis": 2})
    node.outputs[0].shape = onnx_ir.Shape(["s1", 4, "s2 + s22"])
    model = onnx_ir.Model(onnx_ir.Graph([past, new], node.outputs, nodes=[node], opset_imports={"": 20}), ir_version=10)
    fusions.name_axes(model, {"past": {0: "batch", 2: "past"}, "new": {0: "batch", 2: "tokens"}})
    assert str(node.outputs[0].shape) == "[batch,4,tokens + past]"
