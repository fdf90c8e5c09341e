"""A last layer of which one token is read is computed for that token, and gives what the whole layer gives."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
from encoders import VOCABULARY, tiny_encoder

from edgedistill.onnx.first_token import keep_first_token
from edgedistill.onnx.float_export import export_float
from edgedistill.runtimes.graph import GraphProcess


def kinds(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(str(path)).graph.node)


def rows_of(path: Path, values: str) -> int | str:
    """The size of the second axis of a value, as the graph names it."""
    found = next(v for v in onnx.load(str(path)).graph.value_info if v.name == values)
    axis = found.type.tensor_type.shape.dim[1]
    return axis.dim_param or axis.dim_value


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "vit"])
def test_it_equals_the_whole_layer(kind: str, tmp_path: Path) -> None:
    model = tiny_encoder(tmp_path / "model", kind, tokenizer=False)
    first = export_float(model, tmp_path / "first")[0]
    whole = export_float(model, tmp_path / "whole", first_token=False)[0]
    assert kinds(first.path)["MultiHeadAttention"] == 1 and kinds(first.path)["Attention"] == 1
    assert kinds(whole.path)["MultiHeadAttention"] == 0 and kinds(whole.path)["Attention"] == 2
    rng = np.random.default_rng(0)
    with GraphProcess(first.path, threads=1) as one, GraphProcess(whole.path, threads=1) as other:
        for lengths in ([9, 4, 1], [1], [5, 6, 7, 8]):
            if kind == "vit":
                feeds = {"pixel_values": rng.normal(size=(len(lengths), 3, 16, 16)).astype(np.float32)}
            else:
                ids = rng.integers(4, VOCABULARY, (len(lengths), max(lengths)))
                mask = (np.arange(max(lengths))[None] < np.array(lengths)[:, None]).astype(np.int64)
                types = rng.integers(0, 2, ids.shape)
                feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
                feeds = {spec.name: feeds[spec.name] for spec in first.inputs}
            found, expected, torch = one.run(feeds), other.run(feeds), first.reference(feeds)
            np.testing.assert_allclose(found["logits"], expected["logits"], rtol=1e-5, atol=2e-5)
            np.testing.assert_allclose(found["logits"], torch["logits"], rtol=1e-4, atol=1e-4)
    # No weight is stored twice; but for a row's index and the sizes of a split.
    assert first.path.stat().st_size < whole.path.stat().st_size + 4096


def test_only_the_last_layer_is_narrowed(tmp_path: Path) -> None:
    export = export_float(tiny_encoder(tmp_path / "model", "bert", tokenizer=False), tmp_path / "out")[0]
    assert [rows_of(export.path, name) for name in ("attention", "gelu", "attention_1", "gelu_1")] == [
        "sequence", "sequence", 1, 1
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["bert-tokens", "bert-model", "resnet"])
def test_a_graph_whose_tokens_are_all_read_stays(kind: str, tmp_path: Path) -> None:
    model = tiny_encoder(tmp_path / "model", kind, tokenizer=False)
    one, other = (export_float(model, tmp_path / str(flag), first_token=flag)[0] for flag in (True, False))
    assert one.path.read_bytes() == other.path.read_bytes()


def head(
    *, index: int = 0, weight: list[int] | None = None, also_read: bool = False, width: int = 4
) -> tuple[onnx_ir.Model, onnx_ir.Node]:
    """x [batch, tokens, width] → Tanh → MatMul → Add → `[:, index]`; the product is also an output where asked."""

    def weights(name: str, array: np.ndarray) -> onnx_ir.Value:
        tensor = onnx_ir.tensor(array, name=name)
        return onnx_ir.Value(name=name, const_value=tensor, shape=tensor.shape, type=onnx_ir.TensorType(tensor.dtype))

    rng = np.random.default_rng(0)
    real = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    x = onnx_ir.Value(name="x", shape=onnx_ir.Shape(["batch", "tokens", width]), type=real)
    w = weights("w", rng.normal(size=weight or (width, width)).astype(np.float32))
    b, first = weights("b", rng.normal(size=width).astype(np.float32)), weights("first", np.array(index))
    tanh = onnx_ir.node("Tanh", [x])
    product = onnx_ir.node("MatMul", [tanh.outputs[0], w])
    total = onnx_ir.node("Add", [product.outputs[0], b])
    for node in (tanh, product, total):
        node.outputs[0].shape, node.outputs[0].type = onnx_ir.Shape(["batch", "tokens", width]), real
    gather = onnx_ir.node("Gather", [total.outputs[0], first], {"axis": 1})
    gather.outputs[0].name, product.outputs[0].name = "y", "p"
    gather.outputs[0].shape, gather.outputs[0].type = onnx_ir.Shape(["batch", width]), real
    ends = [gather.outputs[0], *([product.outputs[0]] if also_read else [])]
    graph = onnx_ir.Graph(
        [x], ends, nodes=[tanh, product, total, gather], initializers=[w, b, first], opset_imports={"": 20},
        name="head",
    )  # fmt: skip
    return onnx_ir.Model(graph, ir_version=10), product


def test_products_before_the_head_are_narrowed(tmp_path: Path) -> None:
    model, product = head()
    onnx_ir.save(model, str(tmp_path / "before.onnx"))
    assert keep_first_token(model) == 3
    assert str(product.outputs[0].shape) == "[batch,1,4]"
    onnx_ir.save(model, str(tmp_path / "after.onnx"))
    feeds = {"x": np.random.default_rng(1).normal(size=(3, 5, 4)).astype(np.float32)}
    with (
        GraphProcess(tmp_path / "before.onnx", threads=1) as one,
        GraphProcess(tmp_path / "after.onnx", threads=1) as b,
    ):
        np.testing.assert_allclose(one.run(feeds)["y"], b.run(feeds)["y"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "given", [{"index": 1}, {"also_read": True}, {"weight": [2, 4, 4]}], ids=["another token", "read whole", "batched"]
)
def test_what_needs_all_tokens_is_left(given: dict) -> None:
    model, _ = head(**given)
    assert keep_first_token(model) == 0
