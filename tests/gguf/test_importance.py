"""Importance matrices: against a slow reference, whatever the batches, and what libggml makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import CORPUS, tiny, torch_model
from family_models import family
from gguf import GGUFReader
from numpy.typing import NDArray

from edgedistill.errors import UserError
from edgedistill.gguf.dequantize import dequantized
from edgedistill.gguf.ggml import quantize
from edgedistill.gguf.importance import (
    Importance,
    calibration_sequences,
    compute_importance,
    gguf_importance,
    read_importance,
    write_importance,
)
from edgedistill.gguf.quantize import export_gguf
from edgedistill.models.architectures import model_of
from edgedistill.quantization.options import ExportOptions
from edgedistill.records.artifact import Artifact
from edgedistill.strict import read_json

BLOCKS = tuple((f"{number} {text}",) for number, text in enumerate(CORPUS * 40))
OPTIONS = ExportOptions(calibration=BLOCKS, calibration_samples=100, calibration_tokens=64, calibration_source="corpus")


def export(checkpoint: Path, out: Path, quantization: str, options: ExportOptions = OPTIONS) -> Artifact:
    return export_gguf(
        checkpoint, out, quantization=quantization, context_tokens=256, threads=2, name="test", options=options
    )


def ragged(count: int, vocab: int = 400) -> list[NDArray[np.int32]]:
    """Sequences of 5 to 60 tokens."""
    draw = np.random.default_rng(1)
    return [draw.integers(1, vocab, int(draw.integers(5, 60))).astype(np.int32) for _ in range(count)]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("wide") / "model", hidden_size=256, intermediate_size=512, head_dim=64)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family(tmp_path_factory.mktemp("gpt2") / "model", "gpt2", {"hidden_size": 256, "tie_word_embeddings": True})


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family(tmp_path_factory.mktemp("bert") / "model", "bert", {"hidden_size": 256})


def slow_reference(model: Any, sequences: list[NDArray[np.int32]]) -> dict[str, NDArray[np.float64]]:
    """Every input of every matrix kept, one sequence at a time, then squared and averaged in numpy."""
    import torch

    seen: dict[str, list[NDArray[np.float64]]] = {}
    for name, module in model.named_modules():
        if name != "lm_head" and type(module).__name__ in ("Linear", "Conv1D"):
            module.register_forward_hook(
                lambda _m, inputs, _out, name=name: seen.setdefault(name, []).append(inputs[0].double().numpy())
            )
    with torch.inference_mode():
        for sequence in sequences:
            model(input_ids=torch.from_numpy(sequence[None].astype(np.int64)))
    return {
        name: np.mean(np.concatenate([x.reshape(-1, x.shape[-1]) for x in inputs]) ** 2, axis=0)
        for name, inputs in seen.items()
    }


@pytest.mark.parametrize("which", ["wide", "gpt2", "bert"])
def test_it_is_the_mean_of_squares_whatever_the_batches(which: str, request: pytest.FixtureRequest) -> None:
    from transformers import AutoModel

    checkpoint = request.getfixturevalue(which)
    sequences = ragged(40)
    model = torch_model(checkpoint) if which != "bert" else AutoModel.from_pretrained(checkpoint).eval()
    expected = slow_reference(model, sequences)
    task: Any = "embedding" if which == "bert" else "causal-lm"
    longest = max(len(sequence) for sequence in sequences)
    for batch in (1, 8, 32):
        found = compute_importance(checkpoint, sequences, task=task, batch_tokens=batch * longest)
        assert found.tokens == sum(len(sequence) for sequence in sequences)
        assert set(found.mean_squares) == set(expected)
        for name, values in expected.items():
            np.testing.assert_allclose(found.mean_squares[name], values, rtol=1e-5, atol=1e-9, err_msg=name)
        if batch == 1:
            first = found
        for name, values in first.mean_squares.items():
            scale = float(np.abs(values).max())
            assert np.abs(found.mean_squares[name] - values).max() <= 1e-6 * scale, (name, batch)


def test_the_first_layers_inputs_by_hand(wide: Path) -> None:
    """q, k and v read the normed embedding: no hook is needed to know it."""
    import torch

    model = torch_model(wide)
    sequences = ragged(6)
    with torch.inference_mode():
        rows = [model.model.layers[0].input_layernorm(model.model.embed_tokens(torch.from_numpy(s))) for s in sequences]
    expected = torch.cat(rows).double().square().mean(0).numpy()
    found = compute_importance(wide, sequences).mean_squares
    for part in "qkv":
        np.testing.assert_allclose(found[f"model.layers.0.self_attn.{part}_proj"], expected, rtol=1e-6)
    assert "lm_head" not in found


@pytest.mark.parametrize("which", ["wide", "gpt2", "bert"])
@pytest.mark.parametrize("quantization", ["Q4_K_M", "IQ4_NL"])
def test_the_file_holds_what_libggml_makes_of_weights_and_matrix(
    which: str, quantization: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Bytes of every matrix, so columns stand in their order: rows permuted (wide), transposed (gpt2), encoder."""
    checkpoint = request.getfixturevalue(which)
    export(checkpoint, tmp_path / "float", "F16")
    artifact = export(checkpoint, tmp_path / "quantized", quantization)
    assert artifact.calibration is not None
    task: Any = "embedding" if which == "bert" else "causal-lm"
    sequences, record = calibration_sequences(checkpoint, OPTIONS, task=task)
    assert artifact.calibration == record
    model = model_of(read_json(checkpoint / "config.json", what=""), where="")
    matrix = gguf_importance(compute_importance(checkpoint, sequences, task=task), model.specs)
    floats = {t.name: t for t in GGUFReader(tmp_path / "float" / "model.gguf").tensors}
    compared = 0
    for tensor in GGUFReader(tmp_path / "quantized" / "model.gguf").tensors:
        type_ = tensor.tensor_type.name
        if type_ in ("F32", "F16"):
            continue
        source = floats[tensor.name].data.astype(np.float32).reshape(-1, int(tensor.shape[0]))
        expected = quantize(source, type_, matrix.get(tensor.name))
        assert np.array_equal(tensor.data, expected), tensor.name
        if tensor.name in matrix:
            compared += 1
            if type_ in ("Q4_K", "IQ4_NL"):
                assert not np.array_equal(tensor.data, quantize(source, type_)), "the matrix changed nothing"
    assert compared == len(matrix) > 3


def test_it_lowers_the_error_where_inputs_are_large(wide: Path, tmp_path: Path) -> None:
    """The weighted squared error of what is stored, against the same type without the matrix."""
    original = {name: p.detach().numpy() for name, p in torch_model(wide).named_parameters()}
    sequences, _ = calibration_sequences(wide, OPTIONS)
    matrix = compute_importance(wide, sequences).mean_squares
    errors = {}
    for setting in ("on", "off"):
        options = ExportOptions(**{**vars(OPTIONS), "importance_matrix": setting})
        artifact = export(wide, tmp_path / setting, "Q3_K_S", options)
        assert (artifact.calibration is not None) == (setting == "on")
        stored = dict(dequantized(tmp_path / setting / "model.gguf"))
        errors[setting] = {
            name: float(((stored[f"{name}.weight"] - original[f"{name}.weight"]) ** 2 @ mean).sum())
            for name, mean in matrix.items()
        }
    assert all(errors["on"][name] < errors["off"][name] for name in matrix)


def test_the_very_low_types_run_with_a_matrix_and_are_refused_without(wide: Path, tmp_path: Path) -> None:
    from edgedistill.quantization.mixes import BASE_TYPES, MIXES_THAT_NEED_IMPORTANCE
    from edgedistill.runtimes.process import RuntimeProcess

    options = {
        "none given": (ExportOptions(), "none was given"),
        "off": (ExportOptions(calibration=BLOCKS, importance_matrix="off"), "is off"),
        "too little": (ExportOptions(calibration=BLOCKS[:2], calibration_tokens=16), "at least 2,048"),
    }
    for mix in sorted(MIXES_THAT_NEED_IMPORTANCE):
        for name, (option, words) in options.items():
            with pytest.raises(UserError, match=words) as refused:
                export(wide, tmp_path / name, mix, option)
            assert mix in refused.value.cause and not (tmp_path / name).exists()
    for mix in ("IQ3_XXS", "Q2_K_S", "IQ2_S"):  # the others need seconds each for tables that libggml builds
        artifact = export(wide, tmp_path / mix, mix)
        assert BASE_TYPES[mix] in artifact.tensor_types
        with RuntimeProcess("llama.cpp", tmp_path / mix / "model.gguf", threads=1, context_tokens=32) as runtime:
            assert np.isfinite(runtime.logits(np.arange(8))).all()


def test_where_it_would_only_help_too_little_text_is_said(wide: Path, tmp_path: Path) -> None:
    little = ExportOptions(calibration=BLOCKS[:2], calibration_tokens=16)
    artifact = export(wide, tmp_path / "little", "Q4_K_M", little)
    assert artifact.calibration is None
    assert any("at least 2,048" in note for note in artifact.notes)
    assert any("no calibration text" in note for note in export(wide, tmp_path / "a", "Q4_0", ExportOptions()).notes)
    with pytest.raises(UserError, match="at least 2,048"):
        export(wide, tmp_path / "b", "Q4_K_M", ExportOptions(**{**vars(little), "importance_matrix": "on"}))
    # Q8_0 and Q6_K are near enough: nothing to say
    assert export(wide, tmp_path / "c", "Q8_0", OPTIONS).calibration is None


def test_dead_columns_are_zero_and_quantize(wide: Path, tmp_path: Path) -> None:
    """A whole matrix of inputs that calibration never saw: llama.cpp takes zeros as they are."""
    sequences, record = calibration_sequences(wide, OPTIONS)
    measured = compute_importance(wide, sequences, calibration=record)
    dead = {name: np.zeros_like(values) if "down" in name else values for name, values in measured.mean_squares.items()}
    write_importance(Importance(dead, measured.tokens, record), tmp_path / "dead.safetensors")
    for mix in ("IQ3_XXS", "Q3_K_M", "Q4_0", "IQ4_XS"):
        options = ExportOptions(importance_file=tmp_path / "dead.safetensors")
        artifact = export(wide, tmp_path / mix, mix, options)
        assert artifact.calibration == record
        assert all(np.isfinite(values).all() for _, values in dequantized(tmp_path / mix / "model.gguf"))


def test_a_matrix_is_kept_in_a_file(wide: Path, gpt2: Path, tmp_path: Path) -> None:
    sequences, record = calibration_sequences(wide, OPTIONS)
    measured = compute_importance(wide, sequences, calibration=record)
    for name in ("a", "b"):
        write_importance(measured, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    again = read_importance(tmp_path / "a")
    assert (again.tokens, again.calibration) == (measured.tokens, record)
    assert all(np.array_equal(again.mean_squares[name], values) for name, values in measured.mean_squares.items())
    pinned = ExportOptions(importance_file=tmp_path / "a")
    first, second = export(wide, tmp_path / "1", "IQ3_S", pinned), export(wide, tmp_path / "2", "IQ3_S")
    assert first.sha256 == second.sha256
    assert pinned.key() != ExportOptions().key()
    with pytest.raises(UserError, match="of another model"):
        export(gpt2, tmp_path / "3", "IQ3_S", pinned)
    assert not (tmp_path / "3").exists()
    (tmp_path / "a").write_bytes(b"no matrix")
    with pytest.raises(UserError, match="cannot be read"):
        export(wide, tmp_path / "3", "IQ3_S", pinned)


def test_the_order_is_the_seeds_and_recorded(wide: Path) -> None:
    options = {seed: ExportOptions(**{**vars(OPTIONS), "seed": seed}) for seed in (0, 1)}
    (a, one), (b, two) = (calibration_sequences(wide, options[seed]) for seed in (0, 1))
    (again, same) = calibration_sequences(wide, options[0])
    assert one == same and all(np.array_equal(x, y) for x, y in zip(a, again, strict=True))
    assert one.order_sha256 != two.order_sha256
    assert (one.samples, one.tokens, one.seed, one.source) == (100, 100 * 64, 0, "corpus")
    assert all(len(sequence) == 64 and sequence[0] == 0 for sequence in [*a, *b])  # BOS first


def test_what_cannot_be_measured_is_refused(wide: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no calibration text"):
        compute_importance(wide, [])
    with pytest.raises(UserError, match="token 400"):
        compute_importance(wide, [np.array([1, 400], dtype=np.int32)])
    from safetensors.numpy import load_file, save_file

    huge = tiny(tmp_path / "huge")
    weights = load_file(huge / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3] = 3e38
    save_file(weights, huge / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.down_proj are NaN or infinite"):
        compute_importance(huge, ragged(2))
