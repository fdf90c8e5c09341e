"""Padded shortcuts as convolutions: the same values, one layout in the runtime, and nothing else touched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgedistill.onnx.encoder import export_module
from edgedistill.quantization.options import ExportOptions


class Joined(nn.Module):
    """relu(convolution + shortcut), twice: the second block reads what the first one joined."""

    def __init__(self, shortcut: Callable[[Tensor], Tensor], stride: int = 2) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 32, 3, stride, 1)
        self.third = nn.Conv2d(32, 32, 3, padding=1)
        self.shortcut = shortcut

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.first(image))
        x = F.relu(self.second(x) + self.shortcut(x))
        return F.relu(self.third(x) + x).mean((2, 3))


PADDED: dict[str, Callable[[Tensor], Tensor]] = {
    "even": lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8)),
    "behind": lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, 16)),
    "from the second pixel": lambda x: F.pad(x[:, :, 1::2, 1::2], (0, 0, 0, 0, 8, 8)),
}
OTHER: dict[str, Callable[[Tensor], Tensor]] = {
    "ones": lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8), value=1.0),
    "an edge": lambda x: F.pad(x[:, :, ::2, 2::2], (1, 0, 0, 0, 8, 8)),
    "no sum reads it": lambda x: F.pad(x[:, :, ::2], (0, 0, 0, 0, 8, 8))[..., ::2],
}


def exported(
    folder: Path, module: nn.Module, quantization: str = "FP32", size: int = 8, *, ort_format: bool = False
) -> Path:
    torch.manual_seed(0)
    pictures = [{"image": np.random.default_rng(i).standard_normal((1, 3, size, size), np.float32)} for i in range(4)]
    export_module(
        module.eval(), (torch.zeros(2, 3, size, size),), folder, dynamic={"image": {0: "batch"}},
        input_names=["image"], output_names=["out"], quantization=quantization, batches=pictures, threads=1,
        options=ExportOptions(compare_speed=False, ort_format=ort_format),
    )  # fmt: skip
    return folder / "model.onnx"


def operators(path: Path, *, optimized: bool = False) -> Counter[str]:
    if optimized:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(path.with_suffix(".optimized.onnx"))
        options.log_severity_level = 3
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        path = path.with_suffix(".optimized.onnx")
    return Counter(node.op_type for node in onnx.load(str(path)).graph.node)


@pytest.mark.parametrize("name", PADDED)
@pytest.mark.parametrize("size", [8, 7])
def test_it_is_a_convolution_with_the_same_bits(tmp_path: Path, name: str, size: int) -> None:
    even = size if name != "from the second pixel" else 8
    path = exported(tmp_path, Joined(PADDED[name]), size=even)
    found = operators(path)
    # Rows from the second on are sliced before; that they begin elsewhere is no stride.
    assert found["Conv"] == 4 and found["Pad"] == 0 and found["Slice"] == (2 if name == "from the second pixel" else 0)
    # The convolution alone: ones and zeros give back every bit.
    graph = onnx.load(str(path)).graph
    node = next(node for node in graph.node if node.op_type == "Conv" and len(node.input) == 2)
    weight = next(onnx.numpy_helper.to_array(t).copy() for t in graph.initializer if t.name == node.input[1])
    strides = next(list(a.ints) for a in node.attribute if a.name == "strides")
    x = torch.randn(2, 16, even, even)
    read = x[:, :, 1::2, 1::2] if name == "from the second pixel" else x
    assert torch.equal(F.conv2d(read, torch.from_numpy(weight), stride=strides), PADDED[name](x))


@pytest.mark.parametrize("name", OTHER)
def test_what_is_no_such_shortcut_stays(tmp_path: Path, name: str) -> None:
    found = operators(exported(tmp_path, Joined(OTHER[name])))
    assert found["Conv"] == 3 and found["Pad"] == 1


def test_it_runs_in_one_layout_and_on_integers(tmp_path: Path) -> None:
    shortcut = PADDED["even"]
    fused = operators(exported(tmp_path / "float", Joined(shortcut)), optimized=True)
    assert fused["Add"] == fused["Relu"] == fused["Pad"] == fused["Slice"] == 0
    integers = operators(exported(tmp_path / "int8", Joined(shortcut), "INT8"), optimized=True)
    assert integers["QLinearConv"] == 4 and integers["QLinearAdd"] == 2
    assert integers["Conv"] == integers["Pad"] == integers["Slice"] == 0


def test_a_stored_weight_is_dequantized_at_load(tmp_path: Path) -> None:
    path = exported(tmp_path, Joined(PADDED["even"]), "INT8-DYNAMIC")
    stored = {t.name for t in onnx.load(str(path)).graph.initializer if t.data_type == onnx.TensorProto.INT8}
    assert len(stored) == 4
    found = operators(path, optimized=True)
    assert found["Cast"] == found["Mul"] == found["DequantizeLinear"] == 0
    assert found["Conv"] + found["FusedConv"] == 4 and found["Add"] == found["Relu"] == 0


def test_an_ort_file_keeps_the_small_weights(tmp_path: Path) -> None:
    module = Joined(PADDED["even"])
    stored = exported(tmp_path / "int8", module, "INT8-DYNAMIC", ort_format=True).with_suffix(".ort")
    plain = exported(tmp_path / "float", module, ort_format=True).with_suffix(".ort")
    weights = sum(w.numel() for w in module.parameters() if w.ndim == 4) + 16 * 32
    # Three of a weight's four bytes are saved.
    assert plain.stat().st_size - stored.stat().st_size > 2.5 * weights
