"""INT8-WEIGHTS and INT4: what is stored, mixed types, and text2text, in the real runtime."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from encoders import VOCABULARY, tiny_encoder
from onnx import numpy_helper

from edgedistill.errors import UserError
from edgedistill.export.stage import write_artifact
from edgedistill.onnx.blocks import matmul_nbits_values
from edgedistill.onnx.dequantize import unpack
from edgedistill.onnx.float_export import FloatExport, export_float
from edgedistill.onnx.inputs import Batch, random_batches
from edgedistill.onnx.parity import check_parity
from edgedistill.onnx.quantizable import node_types, quantizable_nodes
from edgedistill.onnx.quantize import quantize
from edgedistill.onnx.quantized_graph import load
from edgedistill.quantization.options import ExportOptions


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[FloatExport, list[Batch]]:
    folder = tmp_path_factory.mktemp("bert")
    graph = export_float(tiny_encoder(folder / "model", "bert"), folder / "out")[0]
    return graph, random_batches([spec.name for spec in graph.inputs], VOCABULARY, 40)


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(str(path)).graph.node)


@pytest.mark.parametrize(("quantization", "bits", "within"), [("INT8-WEIGHTS", 8, 0.06), ("INT4", 4, 0.6)])
def test_what_is_stored_is_what_matmul_nbits_values_says(
    tmp_path: Path, bert: Any, quantization: str, bits: int, within: float
) -> None:
    graph, batches = bert
    quantize([graph], tmp_path, quantization=quantization, samples=None)
    path = tmp_path / "model.onnx"
    found = check_parity(graph, path, batches, quantization=quantization, inputs="random", limit=within)
    assert found.relative_rms > 1e-3
    counts = operators(path)
    assert counts["MatMulNBits"] == 11 and counts["MultiHeadAttention"] == 2 and counts["MatMul"] == 0
    before = {t.name: numpy_helper.to_array(t) for t in onnx.load(str(graph.path)).graph.initializer}
    after = {t.name: numpy_helper.to_array(t) for t in onnx.load(str(path)).graph.initializer}
    for info in quantizable_nodes(load(graph)).values():
        weight = before[info.weight]
        name = f"{info.weight}_Q{bits}"
        if info.op_type == "Gather":
            if bits == 8:
                assert after[f"{info.weight}_quantized"].dtype == np.int8
                continue
            packed = after[name].reshape(len(weight), -1, 16)
        else:
            weight = weight if info.axis == 0 else weight.T
            packed = after[name]
        scales = after[f"{name}_scales"].reshape(len(weight), -1)
        back = unpack(packed, scales, None, columns=weight.shape[1], bits=bits, block_size=32)
        np.testing.assert_array_equal(back, matmul_nbits_values(np.ascontiguousarray(weight), bits))


def test_types_by_node(tmp_path: Path, bert: Any) -> None:
    graph, batches = bert
    options = ExportOptions(
        tensor_types=(("layer.0.attention", "FP32"), ("pooler", "INT8"), ("encoder", "INT8-DYNAMIC"))
    )
    fields = quantize([graph], tmp_path, quantization="INT4", samples=None, options=options)
    counts = operators(tmp_path / "model.onnx")
    # The last layer reads one token: its query is a product apart from keys and values, and both are the encoder's.
    assert counts["Attention"] == 1 and counts["MatMul"] == 1 and counts["MultiHeadAttention"] == 1
    assert counts["DynamicQuantizeMatMul"] == 7 and counts["MatMulNBits"] == 2
    assert sorted(set(fields["overrides"].values())) == ["FP32", "INT8-DYNAMIC", "INT8-WEIGHTS"]
    assert len(fields["overrides"]) == 10
    check_parity(graph, tmp_path / "model.onnx", batches, quantization="INT4", inputs="random", limit=0.6)


def test_the_first_expression_that_matches_counts(bert: Any) -> None:
    nodes = quantizable_nodes(load(bert[0]))
    chosen = node_types(nodes, "INT4", types=(("pooler", "FP32"), ("", "INT8")))
    assert Counter(chosen.values()) == {"INT8-WEIGHTS": 12, "FP32": 1}
    for pattern, kind, message in (
        ("nowhere", "FP32", "matches no node"),
        ("pooler", "Q4_K", "no type 'Q4_K'"),
        ("(", "FP32", "is not a regular expression"),
    ):
        with pytest.raises(UserError, match=message):
            node_types(nodes, "INT4", types=((pattern, kind),))


@pytest.mark.parametrize("quantization", ["INT8-DYNAMIC", "INT8-WEIGHTS"])
def test_text2text_in_both_graphs(tmp_path: Path, quantization: str) -> None:
    made = write_artifact(
        tiny_encoder(tmp_path / "model", "t5"), tmp_path / "out", format_="onnx", quantization=quantization,
        context_tokens=0, name="x", options=ExportOptions(tensor_types=(("lm_head", "FP32"),)),
    )  # fmt: skip
    assert made.parity is not None and made.parity.greedy_tokens == 8 and made.speed is not None
    assert list(made.overrides.values()) == ["FP32"]
    wanted = "DynamicQuantizeMatMul" if quantization == "INT8-DYNAMIC" else "MatMulNBits"
    for name in ("encoder.onnx", "decoder.onnx"):
        assert operators(tmp_path / "out" / name)[wanted] >= 7


def test_types_of_a_float_export_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"export\.tensor_types with the quantization FP16"):
        write_artifact(
            tmp_path, tmp_path / "out", format_="onnx", quantization="FP16", context_tokens=0, name="x",
            options=ExportOptions(task="text-classification", tensor_types=(("a", "INT8"),)),
        )  # fmt: skip
