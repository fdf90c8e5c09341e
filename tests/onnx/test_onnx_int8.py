"""INT8 graphs: which kernels run, that they compute what torch does, their weights' bits, and what is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from checkpoints import CORPUS
from encoders import VOCABULARY, tiny_encoder
from onnx import numpy_helper

from edgedistill.errors import UserError
from edgedistill.export.stage import write_artifact
from edgedistill.onnx.blocks import qdq_stored, qdq_values
from edgedistill.onnx.calibration import given_samples, observe_ranges
from edgedistill.onnx.float_export import FloatExport, export_float
from edgedistill.onnx.inputs import Batch, image_batches, random_batches
from edgedistill.onnx.int8_scheme import scheme_of
from edgedistill.onnx.parity import check_parity
from edgedistill.onnx.quantizable import quantizable_nodes
from edgedistill.onnx.quantize import quantize
from edgedistill.onnx.quantized_graph import load, quantize_graph, static_tensors
from edgedistill.quantization.options import ExportOptions
from edgedistill.records.artifact import Artifact

KINDS = ("bert", "resnet", "t5")
# Of tiny random models, whose attention is far from uniform and whose widths average nothing out.
WITHIN = {"bert": 0.15, "resnet": 0.15, "t5": 0.3}


def export(checkpoint: Path, out: Path, quantization: str, **options: Any) -> Artifact:
    return write_artifact(
        checkpoint, out, format_="onnx", quantization=quantization, context_tokens=0, name="x",
        options=ExportOptions(**options),
    )  # fmt: skip


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[FloatExport, list[Batch]]]:
    """A float graph of each kind (T5: its encoder) and batches for it."""
    made = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        graph = export_float(tiny_encoder(folder / "model", kind), folder / "out")[0]
        text = [spec.name for spec in graph.inputs]
        batches = (
            image_batches(folder / "model", graph.inputs) if kind == "resnet" else random_batches(text, VOCABULARY, 40)
        )
        made[kind] = (graph, batches)
    return made


def run_as(path: Path) -> Counter[str]:
    """The operators that onnxruntime runs, after its optimizations."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path.with_suffix(".optimized.onnx"))
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


def made(
    floats: dict[str, tuple[FloatExport, list[Batch]]], kind: str, out: Path, quantization: str, **options: Any
) -> Path:
    """The quantized graph, held to torch."""
    graph, batches = floats[kind]
    asked = ExportOptions(**options)
    samples = given_samples(batches, graph.inputs, options=asked)
    quantize([graph], out, quantization=quantization, samples=samples, options=asked)
    path = out / graph.path.name
    # A CPU that sums products in 16 bits saturates with these.
    limit = 0.5 if asked.int8_scheme in ("u8s8", "s8s8") else WITHIN[kind]
    check_parity(graph, path, batches, quantization=quantization, inputs="random", limit=limit)
    return path


@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile"])
def test_static_bert_runs_on_integers(floats: Any, tmp_path: Path, method: str) -> None:
    found = run_as(made(floats, "bert", tmp_path, "INT8", calibration_method=method))
    # The last layer, whose head reads one token, has its query apart (first_token.py): its attention is float.
    assert found["QAttention"] == found["MultiHeadAttention"] == 1
    assert found["MatMulIntegerToFloat"] == 8 and found["QGemm"] == 2
    assert found["MatMul"] == found["Attention"] == found["DequantizeLinear"] == 0


def test_static_resnet_runs_on_integers(floats: Any, tmp_path: Path) -> None:
    found = run_as(made(floats, "resnet", tmp_path, "INT8"))
    assert found["QLinearConv"] == 6 and found["QLinearAdd"] == 2 and found["Conv"] == found["FusedConv"] == 0
    assert found["MaxPool"] == 1 and found["QGemm"] == 1


@pytest.mark.parametrize("scheme", ["u8s8", "u8s8-7bit", "u8u8", "s8s8"])
def test_every_scheme_computes_what_torch_does(floats: Any, tmp_path: Path, scheme: str) -> None:
    path = made(floats, "bert", tmp_path, "INT8", int8_scheme=scheme)
    made(floats, "resnet", tmp_path, "INT8", int8_scheme=scheme)
    kinds = {t.name: t.data_type for t in onnx.load(str(path)).graph.initializer if t.name.endswith("_quantized")}
    weights = {kind for name, kind in kinds.items() if "embeddings" not in name and "bias" not in name}
    assert weights == {onnx.TensorProto.UINT8 if scheme == "u8u8" else onnx.TensorProto.INT8}


def test_dynamic_runs_on_integers(floats: Any, tmp_path: Path) -> None:
    found = run_as(made(floats, "bert", tmp_path, "INT8-DYNAMIC"))
    assert found["QAttention"] == found["MultiHeadAttention"] == 1
    assert found["DynamicQuantizeMatMul"] == 10 and found["MatMul"] == 0
    with pytest.raises(UserError, match="never int8"):
        made(floats, "bert", tmp_path, "INT8-DYNAMIC", int8_scheme="s8s8")


def test_a_bias_on_the_scores_is_kept(floats: Any, tmp_path: Path) -> None:
    found = run_as(made(floats, "t5", tmp_path, "INT8-DYNAMIC"))
    assert found["MultiHeadAttention"] == 2 and found["QAttention"] == 0
    assert run_as(made(floats, "t5", tmp_path, "INT8"))["MultiHeadAttention"] == 2


@pytest.mark.parametrize("reduce_range", [True, False])
@pytest.mark.parametrize("shape", [(7, 5), (6, 3, 3, 2), (1, 4)])
def test_weights_are_what_qdq_values_says(shape: tuple[int, ...], reduce_range: bool) -> None:
    rng = np.random.default_rng(0)
    values = (rng.standard_normal(shape) * 10.0 ** rng.integers(-6, 3, (shape[0],) + (1,) * (len(shape) - 1))).astype(
        np.float32
    )
    values[0] = 0
    for axis in (0, 1):
        stored, scales, zeros = qdq_stored(values, axis=axis, reduce_range=reduce_range)
        wide = [1] * len(shape)
        wide[axis] = -1
        back = stored.astype(np.float32) * scales.reshape(wide)
        np.testing.assert_array_equal(back, qdq_values(values, axis=axis, reduce_range=reduce_range))
        assert not zeros.any() and np.abs(stored).max() <= (64 if reduce_range else 127)


def test_the_graph_holds_the_weights_that_qdq_values_says(floats: Any, tmp_path: Path) -> None:
    graph, _ = floats["bert"]
    path = made(floats, "bert", tmp_path, "INT8")
    before = {t.name: numpy_helper.to_array(t) for t in onnx.load(str(graph.path)).graph.initializer}
    after = {t.name: numpy_helper.to_array(t) for t in onnx.load(str(path)).graph.initializer}
    scheme, _ = scheme_of("auto")
    nodes = quantizable_nodes(load(graph))
    # Two layers of six, the last one's query apart for it is computed for one token; embeddings, pooler, classifier.
    assert len(nodes) == 13
    for info in nodes.values():
        stored, scales = after[f"{info.weight}_quantized"], after[f"{info.weight}_scale"].reshape(-1)
        wide = [1] * stored.ndim
        wide[info.axis] = -1
        reduce = scheme.reduce_range and info.op_type != "Gather"
        expected = qdq_values(before[info.weight], axis=info.axis, reduce_range=reduce)
        np.testing.assert_array_equal(stored.astype(np.float32) * scales.reshape(wide), expected)
        assert info.weight not in after
    name = "model.classifier.bias"
    scale = after["tanh_scale"] * after["model.classifier.weight_scale"]
    np.testing.assert_array_equal(after[f"{name}_scale"], scale)
    np.testing.assert_array_equal(after[f"{name}_quantized"], np.rint(before[name] / scale.astype(np.float64)))


def test_quantize_graph_keeps_what_it_is_told_and_takes_ranges_once(floats: Any, tmp_path: Path) -> None:
    graph, batches = floats["bert"]
    samples = given_samples(batches, graph.inputs, options=ExportOptions())
    observed = observe_ranges(graph, samples, static_tensors(graph), method="minmax")
    nodes = quantizable_nodes(load(graph))
    kept = next(name for name, info in nodes.items() if info.op_type == "Attention")
    out = tmp_path / "model.onnx"
    whole = quantize_graph(graph, out, quantization="INT8", observed=observed)
    assert run_as(out)["Attention"] == 0 and set(whole.types) == set(nodes)
    part = quantize_graph(graph, out, quantization="INT8", observed=observed, keep=[kept])
    assert run_as(out)["Attention"] == 1 and part.types[kept] == "FP32"
    check_parity(graph, out, batches, quantization="INT8", inputs="random", limit=0.15)
    none = quantize_graph(graph, out, quantization="INT8", observed=observed, keep=list(nodes))
    assert set(none.types.values()) == {"FP32"}
    assert check_parity(graph, out, batches, quantization="FP32", inputs="random").relative_rms < 1e-5
    with pytest.raises(UserError, match="no node 'nowhere'"):
        quantize_graph(graph, out, quantization="INT8", observed=observed, keep=["nowhere"])
    with pytest.raises(UserError, match="nothing to be calibrated on"):
        quantize_graph(graph, out, quantization="INT8")


def test_scheme_follows_the_instruction_set() -> None:
    assert scheme_of("auto", arch="x86_64", isa=["avx2", "fma"])[0].name == "u8s8-7bit"
    assert scheme_of("auto", arch="x86_64", isa=["avx512_vnni"])[0].name == "u8s8"
    assert scheme_of("auto", arch="aarch64", isa=["neon"])[0].name == "u8s8"
    assert scheme_of("s8s8", arch="x86_64", isa=[])[0].signed_activations
    with pytest.raises(UserError, match="no INT8 scheme 'u4'"):
        scheme_of("u4")


def test_the_command_quantizes_with_calibration_and_records_it(tmp_path: Path) -> None:
    checkpoint = tiny_encoder(tmp_path / "model", "bert")
    made = export(
        checkpoint, tmp_path / "out", "INT8", calibration=tuple((line,) for line in CORPUS), calibration_samples=20,
        calibration_source="mine.txt", ort_format=True,
    )  # fmt: skip
    assert made.calibration is not None and made.parity is not None and made.speed is not None
    assert (made.calibration.method, made.calibration.source) == ("minmax", "mine.txt")
    assert 2 <= made.calibration.samples <= 20 and made.calibration.tokens and len(made.calibration.order_sha256) == 64
    assert made.parity.relative_rms < 0.2 and made.speed.quantized_ms > 0
    assert "model.ort" in [file.path for file in made.files] and "INT8 scheme" in made.notes[0]
    assert made.tensor_types["INT8"] >= 10 and made.bits_per_weight < 16
    again = export(
        checkpoint, tmp_path / "again", "INT8", calibration=tuple((line,) for line in CORPUS), calibration_samples=20,
        calibration_source="mine.txt", ort_format=True, compare_speed=False,
    )  # fmt: skip
    # onnxruntime writes the .ort of a quantized graph with other bytes each time.
    one, two = ({f.path: f.sha256 for f in a.files if not f.path.endswith(".ort")} for a in (made, again))
    assert one == two and again.speed is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to be calibrated on"),
        ({"calibration": (("a girl",),)}, "calibrated on 1 sample"),
        ({"calibration": (("a girl",), ("a girl",))}, "2 samples that are all the same"),
        ({"calibration": (("a",), ("b",)), "tensor_types": (("nowhere", "FP32"),)}, "'nowhere' matches no node"),
        ({"calibration": (("a",), ("b",)), "tensor_types": (("layer", "INT3"),)}, "no type 'INT3' for 'layer'"),
    ],
)
def test_what_cannot_calibrate_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    checkpoint = tiny_encoder(tmp_path / "model", "bert")
    with pytest.raises(UserError, match=message):
        export(checkpoint, tmp_path / "out", "INT8", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_text2text_is_refused_with_what_works(tmp_path: Path) -> None:
    checkpoint = tiny_encoder(tmp_path / "model", "t5")
    with pytest.raises(UserError, match="static INT8 of a text2text model") as caught:
        export(checkpoint, tmp_path / "out", "INT8", calibration=(("a",), ("b",)))
    assert "INT8-DYNAMIC or INT8-WEIGHTS" in caught.value.remedy
