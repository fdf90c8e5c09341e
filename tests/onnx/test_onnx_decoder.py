"""transformers folder → onnxruntime-genai folder → real onnxruntime and onnxruntime-genai, against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import copy, edit_json, mean_nll, tiny, torch_greedy, torch_logits, torch_model, with_weights

from edgedistill.config.recipe import load_recipe
from edgedistill.config.targets import load_target
from edgedistill.errors import RuntimeCrashed, UserError
from edgedistill.onnx.decoder import QUANTIZATIONS, export_onnx
from edgedistill.onnx.dequantize import dequantized, unpack
from edgedistill.onnx.parity import relative_rms
from edgedistill.plan.preflight import _require_exportable
from edgedistill.records.artifact import Artifact
from edgedistill.runtimes.process import RuntimeProcess

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FLOAT_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama 3 rope, tied": ("llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama, heads of 8": ("llama", {"head_dim": 8}),
    "qwen2, biases": ("qwen2", {}),
    "qwen3, tied": ("qwen3", {"tie_word_embeddings": True}),
}


def export(checkpoint: Path, out: Path, quantization: str, **changes: Any) -> Artifact:
    settings: dict[str, Any] = {"context_tokens": 128, "name": "test"}
    return export_onnx(checkpoint, out, quantization=quantization, **settings | changes)


def logits(folder: Path, tokens_T: np.ndarray) -> np.ndarray:
    with RuntimeProcess("onnxruntime", folder, threads=2, context_tokens=128) as runtime:
        return runtime.logits(tokens_T)


def stored_in_torch(checkpoint: Path, folder: Path) -> Any:
    config = json.loads((checkpoint / "config.json").read_text())
    return with_weights(checkpoint, dict(dequantized(folder, config)))


def at_full_precision(folder: Path) -> None:
    """Ask MatMulNBits for float32 activations, so that only the weights' quantization is left."""
    import onnx

    path = folder / "model.onnx"
    model = onnx.load(str(path), load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                attribute.i = 1
    onnx.save(model, str(path))


@pytest.mark.parametrize("case", FLOAT_CASES)
def test_float_export_equals_transformers(case: str, tmp_path: Path) -> None:
    family, changes = FLOAT_CASES[case]
    checkpoint = tiny(tmp_path / "model", family, **changes)
    artifact = export(checkpoint, tmp_path / "onnx", "FP32")
    model = torch_model(checkpoint)
    tokens = np.random.default_rng(1).integers(0, 400, 120)
    expected = torch_logits(model, tokens)
    assert np.abs(logits(tmp_path / "onnx", tokens) - expected).max() < 1e-4 * np.abs(expected).max()
    with RuntimeProcess("onnxruntime-genai", tmp_path / "onnx", threads=2, context_tokens=128) as runtime:
        assert runtime.greedy([1, 2, 3], 40) == torch_greedy(model, [1, 2, 3], 40)
    assert artifact.context_tokens == 128
    assert artifact.fallbacks == []
    assert artifact.tensor_types.keys() == {"FLOAT"}
    stored = stored_in_torch(checkpoint, tmp_path / "onnx").state_dict()
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(stored[name].numpy(), tensor.numpy(), err_msg=name)


@pytest.mark.parametrize(
    ("quantization", "family", "tied"),
    [("INT8", "llama", True), ("INT4", "llama", True), ("INT4", "qwen2", False), ("INT8", "qwen3", False)],
)
def test_dequantized_weights_in_torch_equal_the_graph(
    quantization: str, family: str, tied: bool, tmp_path: Path
) -> None:
    # 80 and 112: no multiples of the block of 32
    sizes = {
        "hidden_size": 72 if family == "qwen2" else 80,
        "intermediate_size": 112,
        "num_attention_heads": 3 if family == "qwen2" else 4,
        "num_key_value_heads": 1,
    }
    checkpoint = tiny(tmp_path / "model", family, tie_word_embeddings=tied, **sizes)
    artifact = export(checkpoint, tmp_path / "onnx", quantization)
    tokens = np.random.default_rng(1).integers(0, 400, 100)
    shipped = logits(tmp_path / "onnx", tokens)
    expected = torch_logits(stored_in_torch(checkpoint, tmp_path / "onnx"), tokens)
    assert relative_rms(shipped, expected) < 0.1  # what rounding the activations to INT8 costs
    at_full_precision(tmp_path / "onnx")
    assert relative_rms(logits(tmp_path / "onnx", tokens), expected) < 1e-4
    assert quantization in artifact.tensor_types
    in_float = [f.tensor for f in artifact.fallbacks]
    assert in_float == ([] if tied and quantization == "INT4" else ["model.embed_tokens.weight"])


@pytest.mark.parametrize("quantization", ["FP32", "INT8", "INT4"])
def test_stories260k(quantization: str, test_data: Path, tmp_path: Path) -> None:
    """Heads of 8, width 64, feed-forward 172: greedy text from BOS, and the mean NLL."""
    from tokenizers import Tokenizer

    checkpoint = test_data / "weights" / "stories260k-hf"
    artifact = export(checkpoint, tmp_path / "onnx", quantization, context_tokens=2048)
    assert artifact.context_tokens == 512
    model = torch_model(checkpoint)
    text = (test_data / "text_lm" / "tinystories" / "tinystories_calib.txt").read_text(encoding="utf-8")[:1500]
    tokens = np.array(Tokenizer.from_file(str(checkpoint / "tokenizer.json")).encode(text).ids[:500])
    with RuntimeProcess("onnxruntime", tmp_path / "onnx", threads=2, context_tokens=512) as runtime:
        found = mean_nll(runtime.logits(tokens), tokens)
    expected = mean_nll(torch_logits(model, tokens), tokens)
    assert abs(found - expected) < {"FP32": 1e-4, "INT8": 0.01, "INT4": 0.3}[quantization]
    if quantization == "FP32":
        with RuntimeProcess("onnxruntime-genai", tmp_path / "onnx", threads=2, context_tokens=512) as runtime:
            assert runtime.greedy([1], 200) == torch_greedy(model, [1], 200)


def test_folder_is_whole_and_the_same_each_time(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path / "model", tie_word_embeddings=True)
    first = export(checkpoint, tmp_path / "a" / "onnx", "INT4")
    second = export(copy(checkpoint, tmp_path / "other"), tmp_path / "b" / "elsewhere", "INT4", threads=1)
    assert first == second
    names = {"genai_config.json", "model.onnx", "model.onnx.data", "tokenizer.json", "tokenizer_config.json"}
    assert {f.path for f in first.files} == {p.name for p in (tmp_path / "a" / "onnx").iterdir()} == names
    assert first.bytes == sum(p.stat().st_size for p in (tmp_path / "a" / "onnx").iterdir())
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["onnx"]
    config = json.loads((tmp_path / "a" / "onnx" / "genai_config.json").read_text())
    assert config["model"]["context_length"] == config["search"]["max_length"] == 128
    assert str(tmp_path) not in (tmp_path / "a" / "onnx" / "genai_config.json").read_text()
    assert (tmp_path / "a" / "onnx" / "tokenizer.json").read_bytes() == (checkpoint / "tokenizer.json").read_bytes()


def test_unpack_against_the_slow_formula() -> None:
    rng = np.random.default_rng(0)
    rows, blocks, block_size, columns = 3, 2, 32, 50
    for bits in (4, 8):
        values = rng.integers(0, 1 << bits, (rows, blocks * block_size))
        zeros = rng.integers(0, 1 << bits, (rows, blocks))
        scales = rng.normal(size=(rows, blocks)).astype(np.float32)
        packed = np.zeros((rows, blocks, block_size * bits // 8), dtype=np.uint8)
        packed_zeros = np.zeros((rows, (blocks * bits + 7) // 8), dtype=np.uint8)
        for row in range(rows):
            for column in range(blocks * block_size):
                block, inside = divmod(column, block_size)
                packed[row, block, inside * bits // 8] |= values[row, column] << (inside * bits % 8)
            for block in range(blocks):
                packed_zeros[row, block * bits // 8] |= zeros[row, block] << (block * bits % 8)
        of_block = np.arange(columns) // block_size
        expected = (values[:, :columns] - zeros[:, of_block]) * scales[:, of_block]
        found = unpack(packed, scales, packed_zeros, columns=columns, bits=bits, block_size=block_size)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        centred = (values[:, :columns] - (1 << (bits - 1))) * scales[:, of_block]
        found = unpack(packed, scales, None, columns=columns, bits=bits, block_size=block_size)
        np.testing.assert_allclose(found, centred, rtol=1e-6)


def test_a_builder_that_dies_is_reported(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path / "model")
    (checkpoint / "generation_config.json").write_text("{}")
    tokenizer_config = checkpoint / "tokenizer_config.json"
    tokenizer_config.write_text("[1, 2]")  # transformers fails on it inside the child
    with pytest.raises(RuntimeCrashed, match="the onnxruntime-genai builder failed on"):
        export(checkpoint, tmp_path / "out" / "onnx", "FP32")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "cause"), [("INT3", "no ONNX quantization 'INT3'"), ("FP16", "cannot decode an FP16")]
)
def test_quantizations_that_do_not_work_are_refused(name: str, cause: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=cause) as caught:
        export(tmp_path, tmp_path / "out", name)
    assert "INT8" in caught.value.remedy


def test_heads_that_onnxruntime_cannot_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"heads of 20; onnxruntime's GroupQueryAttention takes multiples of 8"):
        export(tiny(tmp_path / "model", head_dim=20), tmp_path / "out", "FP32")


@pytest.mark.parametrize("kind", ["linear", "yarn"])
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_scaled_tables_that_the_builder_writes_wrongly_are_refused(kind: str, key: str, tmp_path: Path) -> None:
    """Before the builder and before any training: what it wrote was held to torch, and failed each time."""
    folder = tiny(tmp_path / "model")
    scaling = {"factor": 4.0, "original_max_position_embeddings": 64}
    named = {"rope_type": kind} if key == "rope_parameters" else {"type": kind}
    edit_json(folder / "config.json", rope_parameters=None)
    edit_json(folder / "config.json", **{key: {**named, **scaling}})
    with pytest.raises(UserError, match=f"rope_type is '{kind}'(?s:.*)GGUF"):
        export(folder, tmp_path / "out", "FP32")
    recipe = load_recipe("own", [f"teacher.model={folder}", "export.artifacts=onnx:INT4"])
    with pytest.raises(UserError, match=f"rope_type is '{kind}'"):
        _require_exportable(recipe, [load_target("cpu-x86")])
    fresh = load_recipe("own", [f"teacher.model={folder}", "export.artifacts=onnx:INT4", "student.start=fresh"])
    _require_exportable(fresh, [load_target("cpu-x86")])


def test_damaged_weights_are_refused_before_the_builder(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path / "model")
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\x00\x00\xc0\x7f")
    with pytest.raises(UserError, match="NaN"):
        export(checkpoint, tmp_path / "out", "INT4")
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(UserError, match="cut short"):
        export(checkpoint, tmp_path / "out", "INT4")
    assert set(QUANTIZATIONS) == {"FP32", "INT8", "INT4"}
