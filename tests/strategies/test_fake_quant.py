"""Fake quantizers against the bytes that really ship: converted and quantized files, exported graphs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import tiny, torch_model
from family_models import DECODERS, family

from edgedistill.errors import UserError
from edgedistill.gguf.dequantize import dequantized
from edgedistill.gguf.importance import compute_importance, write_importance
from edgedistill.gguf.quantize import export_gguf
from edgedistill.gguf.stored import gguf_values
from edgedistill.onnx.blocks import matmul_nbits_values, qdq_values
from edgedistill.onnx.dequantize import stored
from edgedistill.quantization.options import ExportOptions
from edgedistill.strategies.fake_quant import FakeQuantizer, Rounding, rounding_of

RNG = np.random.default_rng(11)
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
ODD: dict[str, int] = {}  # tiny's own widths, at which most types have to fall back
MIXES = ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_NL", "IQ4_XS", "Q3_K_M", "Q2_K")


def awkward(folder: Path, outlier: float = 300.0) -> None:
    """Make the checkpoint's weights what quantizers stumble over: outliers, zeros, denormals, one sign, one value."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    for number, (name, tensor) in enumerate(sorted(tensors.items())):
        if tensor.ndim < 2:
            continue
        kind = number % 5
        if kind == 0:
            tensor[:, 3] = outlier
        elif kind == 1:
            tensor[: len(tensor) // 2] = 0.0
        elif kind == 2:
            tensor[::2] *= 1e-6  # float16's denormals
            tensor[1::4] *= 1e-36  # float32's, zero in float16
        elif kind == 3:
            tensors[name] = tensor.abs()
        else:
            tensor[::3] = 0.02
    save_file(tensors, path, metadata={"format": "pt"})


def masters(checkpoint: Path) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy() for name, p in torch_model(checkpoint).named_parameters()}


def same(found: np.ndarray, expected: np.ndarray) -> bool:
    """Bit for bit, the sign of zero aside."""
    return found.shape == expected.shape and bool(np.array_equal(found, expected))


@pytest.mark.parametrize("widths", [WIDE, ODD], ids=["wide", "odd"])
@pytest.mark.parametrize("quantization", MIXES)
def test_every_gguf_mix_equals_the_quantized_file(quantization: str, widths: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path / "model", tie_word_embeddings=quantization.startswith("Q4"), **widths)
    awkward(checkpoint)
    out = tmp_path / "out"
    off = ExportOptions(importance_matrix="off")
    rounding = rounding_of(checkpoint, "gguf", quantization, scratch=tmp_path / "scratch")
    export_gguf(checkpoint, out, quantization=quantization, context_tokens=64, threads=1, name="test", options=off)
    file = dict(dequantized(out / "model.gguf"))
    weights = masters(checkpoint)
    assert set(file) == set(weights) == set(rounding.types)
    for name, values in file.items():
        assert same(rounding.stored(name, weights[name]), values), (name, rounding.types[name])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("quantization", ["INT4", "INT8"])
def test_onnx_weights_equal_the_exported_graph(quantization: str, tied: bool, tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path / "model", tie_word_embeddings=tied)
    awkward(checkpoint, outlier=0.2)  # the export holds the graph to torch, and its activations are INT8
    rounding = rounding_of(checkpoint, "onnx", quantization, scratch=tmp_path / "scratch")
    weights = masters(checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    found = {name: values for name, _, values in stored(tmp_path / "scratch", config)}
    assert set(found) == set(rounding.types)
    assert quantization in rounding.types.values()
    for name, values in found.items():
        master = weights[name] if name in weights else weights["model.embed_tokens.weight"]
        assert same(rounding.stored(name, master), values), (name, rounding.types[name])


@pytest.mark.parametrize("bits", [4, 8])
def test_matmul_nbits_pads_the_last_block_and_takes_both_zero_points(bits: int) -> None:
    values = RNG.normal(size=(5, 71)).astype(np.float32)
    for symmetric in (True, False):
        rounded = matmul_nbits_values(values, bits, symmetric=symmetric)
        step = np.abs(values).max() / (1 << (bits - 1))
        assert rounded.shape == values.shape and 0 < np.abs(rounded - values).max() <= 1.01 * step
    assert not matmul_nbits_values(np.zeros((2, 64), dtype=np.float32), bits).any()
    with pytest.raises(UserError, match="NaN"):
        matmul_nbits_values(np.full((1, 32), np.nan, dtype=np.float32), bits)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(("signed", "symmetric"), [(True, True), (True, False), (False, False)])
def test_qdq_values_are_what_onnxruntime_stores(
    signed: bool, symmetric: bool, per_channel: bool, tmp_path: Path
) -> None:
    """A MatMul quantized by onnxruntime's static quantizer, its weight read back from the graph."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    weight = RNG.normal(size=(24, 16)).astype(np.float32)
    weight[:, 2], weight[:, 3], weight[:, 5], weight[3, 6] = 0.0, np.abs(weight[:, 3]), 1e-40, 70.0
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph(
        [node], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 24])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 16])],
        [numpy_helper.from_array(weight, "w")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "float.onnx")

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = [{"x": RNG.normal(size=(2, 24)).astype(np.float32)} for _ in range(2)]

        def get_next(self) -> Any:
            return self.left.pop() if self.left else None

    # without an override onnxruntime makes all weights by channel symmetric
    overrides = {"w": [{"axis": 1, "symmetric": symmetric}]} if per_channel else {}
    quantize_static(
        tmp_path / "float.onnx", tmp_path / "int8.onnx", Reader(), quant_format=QuantFormat.QDQ,
        per_channel=per_channel, weight_type=QuantType.QInt8 if signed else QuantType.QUInt8,
        activation_type=QuantType.QInt8 if signed else QuantType.QUInt8,
        extra_options={"WeightSymmetric": symmetric, "TensorQuantOverrides": overrides},
    )  # fmt: skip
    found = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "int8.onnx").graph.initializer}
    scale, zero = found["w_scale"], found["w_zero_point"]
    expected = (found["w_quantized"].astype(np.int32) - zero.astype(np.int32)).astype(np.float32) * scale
    rounded = qdq_values(weight, axis=1 if per_channel else None, signed=signed, symmetric=symmetric)
    assert same(rounded, expected)


@pytest.mark.parametrize("quantization", ["Q4_0", "Q4_K_M", "IQ4_XS", "Q3_K_M", "Q2_K", "IQ3_S"])
def test_mixes_with_an_importance_matrix_equal_the_quantized_file(quantization: str, tmp_path: Path) -> None:
    """With a matrix llama.cpp chooses other types, and other values of the same type."""
    checkpoint = tiny(tmp_path / "model", **WIDE)
    awkward(checkpoint)
    sequences = [RNG.integers(0, 400, 64).astype(np.int32) for _ in range(8)]
    matrix = tmp_path / "matrix.safetensors"
    write_importance(compute_importance(checkpoint, sequences), matrix)
    options = ExportOptions(importance_matrix="off", importance_file=matrix)
    rounding = rounding_of(checkpoint, "gguf", quantization, scratch=tmp_path / "scratch", options=options)
    weights = masters(checkpoint)
    plain = dataclasses.replace(rounding, importance={})
    differ = False
    for name, values in dequantized(tmp_path / "scratch" / "model.gguf"):
        assert same(rounding.stored(name, weights[name]), values), (name, rounding.types[name])
        if rounding.types[name] in ("Q4_0", "Q4_K", "Q3_K", "Q2_K"):  # quick ones
            differ = differ or not same(plain.stored(name, weights[name]), values)
    assert differ or quantization.startswith("IQ")


@pytest.mark.parametrize(
    "case", ["gpt2", "gemma2", "qwen2, tied", "phi3", "olmo2", "stablelm, biases, linear", "granite, tied"]
)
def test_families_equal_their_quantized_file(case: str, tmp_path: Path) -> None:
    """Transposed weights, norms stored plus one, fused projections: in torch's layout again, bit for bit."""
    if case not in DECODERS:
        case = next(name for name in DECODERS if name.split(",")[0] == case.split(",")[0])
    checkpoint = family(tmp_path / "model", *DECODERS[case])
    rounding = rounding_of(checkpoint, "gguf", "Q4_0", scratch=tmp_path / "scratch")
    weights = masters(checkpoint)
    for name, values in dequantized(tmp_path / "scratch" / "model.gguf"):
        assert same(rounding.stored(name, weights[name]), values), (name, rounding.types[name])
    FakeQuantizer(torch_model(checkpoint), rounding)  # every parameter has its rounding


def test_gradients_pass_straight_through_and_the_masters_come_back(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path / "model", tie_word_embeddings=True)
    model = torch_model(checkpoint)
    model.requires_grad_(True)
    rounding = rounding_of(checkpoint, "gguf", "Q4_0", scratch=tmp_path / "scratch")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    quantizer = FakeQuantizer(model, rounding)
    ids = torch.arange(12)[None]
    with quantizer.applied():
        inside = {name: p.detach().clone() for name, p in model.named_parameters()}
        model(input_ids=ids, labels=ids).loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert same(inside[name].numpy(), rounding.stored(name, before[name].numpy()))
    # the reference: a model that holds the stored values as its own parameters
    plain = torch_model(checkpoint)
    plain.requires_grad_(True)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(inside[name])
    plain(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter.grad, gradients[name]), name


def test_a_tied_head_stored_apart_gives_its_gradient_to_the_shared_master(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path / "model", tie_word_embeddings=True)
    model = torch_model(checkpoint)
    model.requires_grad_(True)
    rounding = rounding_of(checkpoint, "onnx", "INT8", scratch=tmp_path / "scratch")
    assert rounding.types["lm_head.weight"] == "INT8" and rounding.types["model.embed_tokens.weight"] == "FP32"
    quantizer = FakeQuantizer(model, rounding)
    embedding = model.model.embed_tokens.weight
    ids = torch.arange(12)[None]
    with quantizer.applied():
        assert model.lm_head.weight is not embedding
        assert not torch.equal(model.lm_head.weight, embedding)
        model(input_ids=ids, labels=ids).loss.backward()
        apart = embedding.grad.clone(), model.lm_head.weight.grad.clone()
    assert model.lm_head.weight is embedding
    assert torch.equal(embedding.grad, apart[0] + apart[1])
    assert apart[0].abs().max() > 0 and apart[1].abs().max() > 0


def test_the_importance_matrix_changes_what_is_stored_and_errors_name_the_tensor() -> None:
    values = RNG.normal(size=(8, 256)).astype(np.float32)
    importance = RNG.uniform(0.01, 3, 256).astype(np.float32) ** 2
    plain = gguf_values(values, "Q4_K", None, tensor="w")
    assert not same(plain, gguf_values(values, "Q4_K", importance, tensor="w"))
    with pytest.raises(UserError, match="ffn holds"):
        gguf_values(np.full((1, 256), np.inf, dtype=np.float32), "Q4_K", None, tensor="ffn")
    with pytest.raises(UserError, match="holds no other"):
        Rounding("gguf", "Q4_0", {"w": "Q4_0"}).stored("other", values)
