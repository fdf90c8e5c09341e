"""transformers folder → GGUF → real llama.cpp, against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import copy, edit_json, mean_nll, tiny, torch_greedy, torch_logits, torch_model

from edgedistill.errors import UserError
from edgedistill.gguf.convert import convert_to_gguf
from edgedistill.gguf.dequantize import dequantized
from edgedistill.models import streaming
from edgedistill.models.architectures import TensorSpec, from_interleaved, rope_of, to_interleaved
from edgedistill.models.shapes import shape_from_config
from edgedistill.models.streaming import as_stored
from edgedistill.models.weights import StoredTensor
from edgedistill.runtimes.process import RuntimeProcess

# llama.cpp keeps keys and values of its cache in float16, so its logits differ a little from float32's.
CACHE_ERROR = 4e-3
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, grouped heads": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, wide heads": ("llama", {"head_dim": 32}),
    "llama, all heads": (
        "llama",
        {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    ),
    "llama 3 rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama, linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2, biases": ("qwen2", {}),
    "qwen2, tied, yarn": (
        "qwen2",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "qwen3, normed heads": ("qwen3", {}),
    "qwen3, tied, wide heads": ("qwen3", {"tie_word_embeddings": True, "head_dim": 32}),
}


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def llama_logits(gguf: Path, tokens_T: np.ndarray) -> np.ndarray:
    # F16 and F32 weights never touch the extra buffers, so nothing has to be probed.
    with RuntimeProcess("llama.cpp", gguf, threads=1, context_tokens=256, use_extra_bufts=False) as runtime:
        return runtime.logits(tokens_T)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("llama") / "model")


@pytest.mark.parametrize("case", CASES)
def test_logits_in_llama_cpp_equal_transformers(case: str, tmp_path: Path) -> None:
    family, changes = CASES[case]
    checkpoint = tiny(tmp_path / "model", family, **changes)
    facts = convert_to_gguf(checkpoint, tmp_path / "model.gguf", dtype="F32")
    tokens = np.random.default_rng(0).integers(0, 400, 200)
    model = torch_model(checkpoint)
    expected = torch_logits(model, tokens)
    assert relative_error(llama_logits(tmp_path / "model.gguf", tokens), expected) < CACHE_ERROR
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("source", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_dequantized_is_the_checkpoint(source: str, dtype: Any, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    checkpoint = tiny(tmp_path / "model", "qwen2", dtype=source)
    convert_to_gguf(checkpoint, tmp_path / "model.gguf", dtype=dtype)
    found = dict(dequantized(tmp_path / "model.gguf"))
    stored = load_file(checkpoint / "model.safetensors")
    assert found.keys() == stored.keys()
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    for name, tensor in stored.items():
        expected = tensor.float()
        if tensor.ndim > 1:
            expected = expected.to(kinds[dtype]).float()
        np.testing.assert_array_equal(found[name], expected.numpy(), err_msg=name)


def test_the_same_input_gives_the_same_bytes(llama: Path, tmp_path: Path) -> None:
    elsewhere = copy(llama, tmp_path / "another" / "folder")
    convert_to_gguf(llama, tmp_path / "a.gguf", name="tiny")
    convert_to_gguf(elsewhere, tmp_path / "b.gguf", name="tiny")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_sharded_checkpoint_equals_single_file(llama: Path, tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    torch_model(llama).save_pretrained(sharded, max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (sharded / name).write_bytes((llama / name).read_bytes())
    convert_to_gguf(llama, tmp_path / "a.gguf")
    convert_to_gguf(sharded, tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    next(sharded.glob("model-00002*.safetensors")).unlink()
    with pytest.raises(UserError, match=r"model-00002.* is missing"):
        convert_to_gguf(sharded, tmp_path / "c.gguf")


def test_config_of_transformers_4(llama: Path, tmp_path: Path) -> None:
    old = copy(llama, tmp_path / "old")
    edit_json(old / "config.json", rope_parameters=None, rope_theta=10000.0, rope_scaling=None)
    convert_to_gguf(llama, tmp_path / "a.gguf")
    convert_to_gguf(old, tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    config = json.loads((llama / "config.json").read_text())
    shape = shape_from_config(config, where="here")
    new = rope_of(config | {"rope_parameters": LLAMA3_ROPE}, shape, where="here")
    scaling = {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"}
    config.pop("rope_parameters")
    before = rope_of(config | {"rope_theta": 10000.0, "rope_scaling": scaling}, shape, where="here")
    assert new.metadata == before.metadata
    np.testing.assert_array_equal(new.frequency_factors, before.frequency_factors)


def test_rope_permutation_has_its_inverse() -> None:
    weight = np.random.default_rng(0).normal(size=(24, 5))
    permuted = to_interleaved(weight, 3)
    assert not np.array_equal(permuted, weight)
    np.testing.assert_array_equal(from_interleaved(permuted, 3), weight)
    # head 1 of 3, head size 8: row 2i is transformers' row i, row 2i + 1 its row i + 4
    np.testing.assert_array_equal(permuted[8], weight[8])
    np.testing.assert_array_equal(permuted[9], weight[12])


def test_bfloat16_rounds_as_torch_does() -> None:
    import torch

    values = np.random.default_rng(0).normal(size=4096).astype(np.float32)
    values[:4] = [1.00390625, 1.01171875, -1.00390625, 3e38]  # ties to even, and near the largest
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(as_stored(values, "BF16", tensor="x"), expected)


def stored(path: Path, bits: np.ndarray, dtype: str, shape: tuple[int, ...]) -> StoredTensor:
    path.write_bytes(b"head" + bits.tobytes())
    return StoredTensor(path=path, offset=4, dtype=dtype, shape=shape)


@pytest.mark.parametrize("heads", [0, 4])
@pytest.mark.parametrize("target", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("source", ["F32", "F16", "BF16", "F64"])
def test_streamed_in_blocks_as_torch_converts(
    source: str, target: Any, heads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that do not divide the rows; values of all sizes, denormal ones and ties included."""
    import torch

    kinds = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    monkeypatch.setattr(streaming, "BLOCK_ELEMENTS", 100)
    torch.manual_seed(0)
    values = (torch.randn(96, 7) * 10.0 ** torch.randint(-8, 4, (96, 7))).to(kinds[source])
    values[0, :3] = torch.tensor([1.00390625, 1.01171875, 1.00048828125])
    raw = values.view(torch.int16).numpy() if source == "BF16" else values.numpy()
    tensor = stored(tmp_path / "in", raw, source, (96, 7))
    with (tmp_path / "out").open("wb") as out:
        streaming.write_tensor(out, tensor, TensorSpec("x", (96, 7), heads), target, name="x")
    expected = values.to(torch.float32).to(kinds[target])
    expected = expected.view(torch.int16).numpy() if target == "BF16" else expected.numpy()
    expected = to_interleaved(expected, heads) if heads else expected
    assert (tmp_path / "out").read_bytes() == expected.tobytes()


def test_every_bfloat16_becomes_the_float16_of_torch(tmp_path: Path) -> None:
    import torch

    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    fits = every[every.float().abs() <= 65504]
    tensor = stored(tmp_path / "in", fits.view(torch.int16).numpy(), "BF16", (1, len(fits)))
    with (tmp_path / "out").open("wb") as out:
        streaming.write_tensor(out, tensor, TensorSpec("x", (1, len(fits))), "F16", name="x")
    assert (tmp_path / "out").read_bytes() == fits.to(torch.float16).numpy().tobytes()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("source", ["F32", "F16", "BF16", "F64"])
@pytest.mark.parametrize("target", ["F32", "F16", "BF16"])
def test_no_value_that_is_not_finite_gets_through(source: str, target: Any, value: float, tmp_path: Path) -> None:
    import torch

    kinds = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    values = torch.randn(8, 8).to(kinds[source])
    values[5, 5:7] = value
    raw = values.view(torch.int16).numpy() if source == "BF16" else values.numpy()
    tensor = stored(tmp_path / "in", raw, source, (8, 8))
    with (tmp_path / "out").open("wb") as out, pytest.raises(UserError, match="x holds 2 values that are NaN"):
        streaming.write_tensor(out, tensor, TensorSpec("x", (8, 8)), target, name="x")


def test_conversion_holds_a_few_blocks_in_memory(tmp_path: Path) -> None:
    """256 MB of bfloat16 in a process of its own: its memory grows by less than a quarter of that."""
    import subprocess
    import sys

    with (tmp_path / "in").open("wb") as file:
        file.truncate(256 << 20)
    script = (
        "import sys; from pathlib import Path; from edgedistill.models.streaming import write_tensor\n"
        "from edgedistill.models.architectures import TensorSpec; from edgedistill.models.weights import StoredTensor\n"
        "from edgedistill.machine.facts import peak_rss_bytes as peak\n"
        "shape, before = (65536, 2048), peak()\n"
        "tensor = StoredTensor(Path(sys.argv[1]), 0, 'BF16', shape)\n"
        "with open('/dev/null', 'wb') as out:\n"
        "    write_tensor(out, tensor, TensorSpec('x', shape, 32), 'F16', name='x')\n"
        "print(peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "in")], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 64 << 20


def damage_truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def damage_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def damage_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def damage_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def change_tensor(folder: Path, name: str, value: Any) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    if value is None:
        tensors.pop(name)
    else:
        tensors[name] = value(tensors[name]) if name in tensors else value(None)
    save_file(tensors, folder / "model.safetensors")


def damage_nan(folder: Path) -> None:
    change_tensor(
        folder, "model.layers.1.mlp.up_proj.weight", lambda t: t.index_fill(0, t.new_tensor([0]).long(), float("nan"))
    )


def damage_overflow(folder: Path) -> None:
    change_tensor(folder, "model.layers.1.mlp.up_proj.weight", lambda t: t + 70000.0)


def damage_shape(folder: Path) -> None:
    change_tensor(folder, "model.layers.0.self_attn.k_proj.weight", lambda t: t[:16].clone())


def damage_missing(folder: Path) -> None:
    change_tensor(folder, "model.layers.0.mlp.down_proj.weight", None)


def damage_extra(folder: Path) -> None:
    import torch

    change_tensor(folder, "model.layers.0.adapter.weight", lambda _: torch.zeros(4, 4))


def damage_architecture(folder: Path) -> None:
    edit_json(folder / "config.json", architectures=["MambaForCausalLM"])


def damage_model_type(folder: Path) -> None:
    edit_json(folder / "config.json", architectures=["Qwen2ForCausalLM"])


def damage_rope(folder: Path) -> None:
    edit_json(folder / "config.json", rope_parameters={"rope_type": "longrope", "rope_theta": 1e4})


def damage_vocabulary(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({"id": 400, "content": "<extra>", "special": True})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def damage_config(folder: Path) -> None:
    (folder / "config.json").write_text("{not json")


@pytest.mark.parametrize(
    ("damage", "cause", "remedy"),
    [
        (damage_truncate, r"cut short: its tensors end at byte [\d,]+", "again"),
        (damage_header, "cut short: its header alone", "100 bytes"),
        (damage_pickle, "only as a pickle", "safe_serialization"),
        (damage_no_weights, "holds no weights", "model.safetensors"),
        (damage_nan, r"up_proj.* 64 values that are NaN", "earlier checkpoint"),
        (damage_overflow, r"up_proj.* more than float16's largest value 65504", "BF16 or F32"),
        (damage_shape, r"k_proj.weight is \[16, 64\], config.json says \[32, 64\]", "same model"),
        (damage_missing, r"1 tensor\(s\) missing, e.g. model.layers.0.mlp.down_proj.weight", "whole checkpoint"),
        (damage_extra, r"1 tensor\(s\) that .*adapter.weight", "merge adapters"),
        (damage_architecture, "'MambaForCausalLM'", "LlamaForCausalLM"),
        (damage_model_type, "does not go with model_type 'llama'", "same family"),
        (damage_rope, "rope_type is 'longrope'", "llama3"),
        (damage_vocabulary, "401 tokens, but the model's embedding has 400 rows", "trained with"),
        (damage_config, "config.json: it is not JSON", "config.json"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_what_cannot_be_converted_is_refused(damage: Any, cause: str, remedy: str, llama: Path, tmp_path: Path) -> None:
    folder = copy(llama, tmp_path / "model")
    damage(folder)
    out = tmp_path / "out"
    with pytest.raises(UserError, match=cause) as caught:
        convert_to_gguf(folder, out / "model.gguf")
    assert remedy in caught.value.remedy
    assert not out.exists() or not list(out.iterdir())


def test_overflowing_weights_work_as_bf16(llama: Path, tmp_path: Path) -> None:
    folder = copy(llama, tmp_path / "model")
    damage_overflow(folder)
    convert_to_gguf(folder, tmp_path / "model.gguf", dtype="BF16")
    assert max(float(np.abs(v).max()) for _, v in dequantized(tmp_path / "model.gguf")) > 65504


def test_a_tied_model_with_another_head_is_refused(llama: Path, tmp_path: Path) -> None:
    folder = copy(llama, tmp_path / "model")
    edit_json(folder / "config.json", tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"tie_word_embeddings is true, but lm_head\.weight differs"):
        convert_to_gguf(folder, tmp_path / "model.gguf")


def test_stories260k_in_llama_cpp_equals_transformers(test_data: Path, tmp_path: Path) -> None:
    """The issue's acceptance: greedy text from BOS for 200 tokens, and mean NLL within 1e-3."""
    from tokenizers import Tokenizer

    checkpoint = test_data / "weights" / "stories260k-hf"
    convert_to_gguf(checkpoint, tmp_path / "model.gguf")
    model = torch_model(checkpoint)
    text = (test_data / "text_lm" / "tinystories" / "tinystories_calib.txt").read_text(encoding="utf-8")[:6000]
    ids = Tokenizer.from_file(str(checkpoint / "tokenizer.json")).encode(text).ids
    windows = [np.array([1, *ids[start : start + 255]]) for start in range(1, 4 * 255, 255)]
    with RuntimeProcess(
        "llama.cpp", tmp_path / "model.gguf", threads=1, context_tokens=256, use_extra_bufts=False
    ) as runtime:
        assert runtime.greedy([1], 200) == torch_greedy(model, [1], 200)
        found = np.mean([mean_nll(runtime.logits(w), w) for w in windows])
    expected = np.mean([mean_nll(torch_logits(model, w), w) for w in windows])
    assert abs(found - expected) < 1e-3


def test_a_real_bf16_model(test_data: Path, tmp_path: Path) -> None:
    checkpoint = test_data / "weights" / "teacher-tinystories-21m"
    facts = convert_to_gguf(checkpoint, tmp_path / "model.gguf")
    assert facts["parameters"] == 20_978_176
    tokens = np.random.default_rng(0).integers(0, 4096, 100)
    expected = torch_logits(torch_model(checkpoint), tokens)
    assert relative_error(llama_logits(tmp_path / "model.gguf", tokens), expected) < CACHE_ERROR
