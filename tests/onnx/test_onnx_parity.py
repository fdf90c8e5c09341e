"""A graph that is wrong is refused, and the first tensor that departs is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from encoders import VOCABULARY, tiny_encoder
from onnx import numpy_helper

from edgedistill.errors import UserError
from edgedistill.onnx.float_export import FloatExport, export_float
from edgedistill.onnx.inputs import Batch, image_batches, random_batches
from edgedistill.onnx.parity import check_parity, first_departure, relative_rms


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> FloatExport:
    folder = tmp_path_factory.mktemp("bert")
    return export_float(tiny_encoder(folder / "model", "bert", tokenizer=False), folder / "out")[0]


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> FloatExport:
    folder = tmp_path_factory.mktemp("resnet")
    return export_float(tiny_encoder(folder / "model", "resnet"), folder / "out")[0]


def texts(export: FloatExport) -> list[Batch]:
    return random_batches([spec.name for spec in export.inputs], VOCABULARY, 40)


def broken(export: FloatExport, node_of: str, op_type: str) -> Path:
    """A copy of the graph in which a weight of one node is wrong in one row."""
    model = onnx.load(str(export.path))
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    node = next(
        n
        for n in model.graph.node
        if n.op_type == op_type and any(p.value == f"model.{node_of}" for p in n.metadata_props)
    )
    tensor = next(initializers[name] for name in node.input if name in initializers)
    values = numpy_helper.to_array(tensor).copy()
    values[..., 0] += 1
    # A tensor of its own: equal ones are stored once, and the others shall stay right.
    model.graph.initializer.append(numpy_helper.from_array(values, "broken"))
    node.input[list(node.input).index(tensor.name)] = "broken"
    path = export.path.with_name("broken.onnx")
    onnx.save(model, str(path))
    return path


@pytest.mark.parametrize(
    ("module", "op_type", "named"),
    [
        ("bert.embeddings.word_embeddings", "Gather", "of bert.embeddings.word_embeddings,"),
        ("bert.encoder.layer.0.attention.self", "Attention", "of bert.encoder.layer.0.attention.self,"),
        # Of the last layer only the first token is there (first_token.py), and compared with torch's.
        (
            "bert.encoder.layer.1.attention.output.dense",
            "MatMul",
            "of bert.encoder.layer.1.attention.output.LayerNorm,",
        ),
        # Its bias is added in the norm behind it, so that the norm's output is the first that torch has too.
        ("bert.encoder.layer.1.output.dense", "MatMul", "of bert.encoder.layer.1.output.LayerNorm,"),
        ("bert.pooler.dense", "Gemm", "of bert.pooler.dense,"),
        ("classifier", "Gemm", "logits of classifier,"),
    ],
)
def test_the_first_tensor_that_departs_is_named(bert: FloatExport, module: str, op_type: str, named: str) -> None:
    graph = broken(bert, module, op_type)
    with pytest.raises(UserError, match="does not compute what torch does") as caught:
        check_parity(bert, graph, texts(bert), quantization="FP32", inputs="random tokens")
    assert named in caught.value.cause
    assert not list(graph.parent.glob(".exposed*"))


def test_a_convolution_with_its_norm_is_named_by_the_norm(resnet: FloatExport) -> None:
    folder = resnet.path.parent
    graph = broken(resnet, "resnet.encoder.stages.1.layers.0.layer.0.normalization", "Conv")
    with pytest.raises(UserError, match=r"departs is .* of resnet.encoder.stages.1.layers.0.layer.0.normalization,"):
        check_parity(resnet, graph, image_batches(folder, resnet.inputs), quantization="FP32", inputs="images")


def test_a_graph_that_ignores_padding_is_refused(bert: FloatExport) -> None:
    model = onnx.load(str(bert.path))
    for node in model.graph.node:
        if node.op_type == "Attention":
            node.input[3] = ""
    path = bert.path.with_name("unmasked.onnx")
    onnx.save(model, str(path))
    with pytest.raises(UserError, match=r"of bert.encoder.layer.0.attention.self,"):
        check_parity(bert, path, texts(bert), quantization="FP32", inputs="random tokens")


def test_a_whole_graph_passes_and_nothing_departs(bert: FloatExport) -> None:
    found = check_parity(bert, bert.path, texts(bert), quantization="FP32", inputs="random tokens")
    assert found.relative_rms < 1e-5 and found.values == 3 * 8 and found.max_abs_difference < 1e-4
    assert first_departure(bert, bert.path, texts(bert)[1], limit=1e-4) is None


def test_nan_is_infinitely_far(bert: FloatExport) -> None:
    model = onnx.load(str(bert.path))
    tensor = next(t for t in model.graph.initializer if t.name.endswith("classifier.bias"))
    tensor.CopyFrom(numpy_helper.from_array(np.full(3, np.nan, np.float32), tensor.name))
    path = bert.path.with_name("nan.onnx")
    onnx.save(model, str(path))
    with pytest.raises(UserError, match="differs by inf"):
        check_parity(bert, path, texts(bert), quantization="FP32", inputs="random tokens")


def test_relative_rms_is_of_the_spread_and_not_of_the_level() -> None:
    expected = np.array([100.0, 101.0, 102.0])
    assert relative_rms(expected + 0.1, expected) == pytest.approx(0.1 / np.std(expected))
    assert relative_rms(np.array([1.5]), np.array([1.0])) == pytest.approx(0.5)
    assert relative_rms(np.array([np.nan]), np.array([1.0])) == float("inf")
