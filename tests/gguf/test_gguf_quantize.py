"""Quantized GGUFs in real llama.cpp: types and fallbacks as they are in the file, and what they cost."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import copy, mean_nll, tiny, torch_logits, torch_model, with_weights
from family_models import DECODERS, ENCODERS, family

from edgedistill.errors import UserError
from edgedistill.gguf.dequantize import dequantized
from edgedistill.gguf.quantize import QUANTIZATIONS, export_gguf, fallbacks_of
from edgedistill.gguf.request import matrices_of, planned_types
from edgedistill.models.architectures import model_of
from edgedistill.quantization.mixes import MIXES_THAT_NEED_IMPORTANCE, usable_type
from edgedistill.quantization.options import ExportOptions
from edgedistill.records.artifact import Artifact
from edgedistill.runtimes.process import RuntimeProcess
from edgedistill.strict import read_json


def export(checkpoint: Path, out: Path, quantization: str, **changes: Any) -> Artifact:
    settings: dict[str, Any] = {"context_tokens": 256, "threads": 2, "name": "test"}
    return export_gguf(checkpoint, out, quantization=quantization, **settings | changes)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Widths of 256: no type has to fall back."""
    return tiny(tmp_path_factory.mktemp("wide") / "model", hidden_size=256, intermediate_size=512, head_dim=64)


@pytest.mark.parametrize("quantization", ["Q4_K_M", "Q4_0", "Q8_0"])
def test_dequantized_weights_in_torch_equal_the_shipped_file(
    quantization: str, test_data: Path, tmp_path: Path
) -> None:
    """A real model: what torch computes with the stored weights is what llama.cpp computes from the file."""
    from tokenizers import Tokenizer

    checkpoint = test_data / "weights" / "teacher-tinystories-21m"
    artifact = export(checkpoint, tmp_path, quantization)
    text = (test_data / "text_lm" / "tinystories" / "tinystories_lowercase_4MB.txt").read_text(encoding="utf-8")[-3000:]
    tokens = np.array(Tokenizer.from_file(str(checkpoint / "tokenizer.json")).encode(text).ids[:256])
    with RuntimeProcess("llama.cpp", tmp_path / "model.gguf", threads=2, context_tokens=256) as runtime:
        shipped_TV = runtime.logits(tokens)
    model = with_weights(checkpoint, dict(dequantized(tmp_path / "model.gguf")))
    shipped = mean_nll(shipped_TV, tokens)
    original = mean_nll(torch_logits(torch_model(checkpoint), tokens), tokens)
    assert abs(shipped - mean_nll(torch_logits(model, tokens), tokens)) < 0.01
    assert abs(shipped - original) < {"Q8_0": 0.01, "Q4_K_M": 0.1, "Q4_0": 0.2}[quantization]
    assert artifact.fallbacks == []
    bits = {"Q8_0": (8.0, 8.6), "Q4_K_M": (4.5, 5.6), "Q4_0": (4.5, 5.2)}[quantization]
    assert bits[0] < artifact.bits_per_weight < bits[1]


def test_artifact_describes_the_file(wide: Path, tmp_path: Path) -> None:
    from gguf import GGUFReader

    artifact = export(wide, tmp_path, "Q4_K_M")
    path = tmp_path / "model.gguf"
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]
    assert artifact.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() == artifact.files[0].sha256
    assert artifact.bytes == path.stat().st_size == artifact.files[0].bytes
    assert (artifact.entry, artifact.runtime, artifact.context_tokens) == ("model.gguf", "llama.cpp", 256)
    assert artifact.parameters == sum(p.numel() for p in torch_model(wide).parameters())
    assert sum(artifact.tensor_types.values()) == len(GGUFReader(path).tensors)
    assert {"Q4_K", "Q6_K", "F32"} == set(artifact.tensor_types)
    assert artifact.fallbacks == []


def test_the_same_input_gives_the_same_bytes(wide: Path, tmp_path: Path) -> None:
    first = export(wide, tmp_path / "a", "Q4_K_M", threads=1)
    second = export(copy(wide, tmp_path / "elsewhere"), tmp_path / "b", "Q4_K_M", threads=2)
    assert first.sha256 == second.sha256


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        ("Q8_0", {"blk.0.ffn_down.weight": ("Q8_0", "F16")}),
        ("Q4_0", {"blk.0.ffn_down.weight": ("Q4_0", "F16"), "token_embd.weight": ("Q6_K", "Q8_0")}),
        ("Q4_K_M", {"blk.0.attn_q.weight": ("Q4_K", "Q5_0"), "blk.0.ffn_down.weight": ("Q4_K", "F16")}),
        ("F16", {}),
        ("F32", {}),
        ("BF16", {}),
    ],
)
def test_odd_widths_fall_back_and_run(
    quantization: str, expected: dict[str, tuple[str, str]], test_data: Path, tmp_path: Path
) -> None:
    """stories260k: width 64 and feed-forward 172. Every fallback is named; the result still tells the story."""
    from gguf import GGUFReader

    checkpoint = test_data / "weights" / "stories260k-hf"
    artifact = export(checkpoint, tmp_path, quantization, context_tokens=4096)
    assert artifact.context_tokens == 512
    found = {f.tensor: f for f in artifact.fallbacks}
    for tensor, (wanted, got) in expected.items():
        assert (found[tensor].wanted, found[tensor].got) == (wanted, got)
    assert bool(found) == bool(expected)
    if "blk.0.ffn_down.weight" in found:
        assert "172 columns" in found["blk.0.ffn_down.weight"].why
    in_the_file = {t.name: t.tensor_type.name for t in GGUFReader(tmp_path / "model.gguf").tensors}
    assert all(in_the_file[name] == fallback.got for name, fallback in found.items())

    tokens = np.array([1, *np.random.default_rng(0).integers(259, 512, 60)])
    with RuntimeProcess("llama.cpp", tmp_path / "model.gguf", threads=2, context_tokens=128) as runtime:
        shipped = runtime.logits(tokens)
    stored = torch_logits(with_weights(checkpoint, dict(dequantized(tmp_path / "model.gguf"))), tokens)
    assert np.abs(shipped - stored).max() < 0.05 * np.abs(stored).max()


def test_every_quantization_is_known_to_llama_cpp_and_runs(wide: Path, tmp_path: Path) -> None:
    tokens = np.arange(20)
    # Those that need an importance matrix: tests/gguf/test_importance.py
    for quantization in (name for name in QUANTIZATIONS if name not in MIXES_THAT_NEED_IMPORTANCE):
        artifact = export(wide, tmp_path / quantization, quantization)
        assert QUANTIZATIONS[quantization] in artifact.tensor_types, quantization
        with RuntimeProcess(
            "llama.cpp", tmp_path / quantization / "model.gguf", threads=2, context_tokens=64
        ) as runtime:
            found = runtime.logits(tokens)
        stored = with_weights(wide, dict(dequantized(tmp_path / quantization / "model.gguf")))
        # llama.cpp quantizes activations too, which weighs more in a random model than in a trained one.
        assert np.corrcoef(found.ravel(), torch_logits(stored, tokens).ravel())[0, 1] > 0.99, quantization


def test_unknown_quantization_says_what_is_near(wide: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no GGUF quantization 'Q4_KM'") as caught:
        export(wide, tmp_path / "out", "Q4_KM")
    assert caught.value.remedy == "did you mean 'Q4_K_M'?"
    assert not (tmp_path / "out").exists()


def with_types(**types: str) -> ExportOptions:
    return ExportOptions(tensor_types=tuple(types.items()))


def types_in(folder: Path) -> dict[str, str]:
    from gguf import GGUFReader

    return {t.name: t.tensor_type.name for t in GGUFReader(folder / "model.gguf").tensors}


@pytest.mark.parametrize("case", ["llama, biases", "gemma2", "phi3", "gpt2", "bert"])
@pytest.mark.parametrize("quantization", ["Q4_K_M", "Q3_K_L", "IQ4_XS"])
def test_types_of_every_family_are_those_planned(case: str, quantization: str, tmp_path: Path) -> None:
    """Fused, transposed and encoders' matrices: what llama.cpp writes by itself is what the rules say."""
    model_type, changes = (DECODERS | ENCODERS)[case]
    checkpoint = family(tmp_path / "model", model_type, {**changes, "num_hidden_layers": 9})
    export(checkpoint, tmp_path / "out", quantization)
    written = types_in(tmp_path / "out")
    model = model_of(read_json(checkpoint / "config.json", what=""), where="")
    columns = matrices_of(model)
    planned = planned_types(model, quantization, {}, importance=False)
    assert {name: written.pop(name) for name in columns} == {n: usable_type(t, columns[n]) for n, t in planned.items()}
    assert set(written.values()) == {"F32"}


def test_overrides_change_what_they_name_and_nothing_else(tmp_path: Path) -> None:
    """llama.cpp counts layers only where it chooses, so an override in a layer must not shift the others'."""
    checkpoint = tiny(
        tmp_path / "model", hidden_size=256, intermediate_size=256, head_dim=64, num_hidden_layers=9, vocab_size=400
    )
    export(checkpoint, tmp_path / "plain", "Q4_K_M")
    plain = types_in(tmp_path / "plain")
    options = with_types(**{r"blk\.0\.(attn_v|ffn_down)": "q8_0", r"^output\.": "Q4_0", "attn_q": "BF16"})
    artifact = export(checkpoint, tmp_path / "mixed", "Q4_K_M", options=options)
    mixed = types_in(tmp_path / "mixed")
    changed = {name: type_ for name, type_ in mixed.items() if type_ != plain[name]}
    queries = {f"blk.{layer}.attn_q.weight": "BF16" for layer in range(9)}
    expected = {"blk.0.attn_v.weight": "Q8_0", "blk.0.ffn_down.weight": "Q8_0", "output.weight": "Q4_0", **queries}
    assert changed == expected == artifact.overrides
    assert artifact.fallbacks == []
    tokens = np.arange(20)
    with RuntimeProcess("llama.cpp", tmp_path / "mixed" / "model.gguf", threads=2, context_tokens=64) as runtime:
        found = runtime.logits(tokens)
    stored = with_weights(checkpoint, dict(dequantized(tmp_path / "mixed" / "model.gguf")))
    # Nine random layers of rounded activations
    assert np.corrcoef(found.ravel(), torch_logits(stored, tokens).ravel())[0, 1] > 0.95


def test_a_float_file_may_hold_single_quantized_tensors(wide: Path, tmp_path: Path) -> None:
    from gguf import GGUFReader

    export(wide, tmp_path / "plain", "F16")
    artifact = export(wide, tmp_path / "mixed", "F16", options=with_types(**{r"blk\.1\.ffn_down": "Q4_K"}))
    plain, mixed = (GGUFReader(tmp_path / name / "model.gguf") for name in ("plain", "mixed"))
    assert artifact.overrides == {"blk.1.ffn_down.weight": "Q4_K"}
    assert artifact.tensor_types == {**artifact.tensor_types, "Q4_K": 1}
    before = {t.name: t for t in plain.tensors}
    for tensor in mixed.tensors:
        if tensor.name != "blk.1.ffn_down.weight":
            assert np.array_equal(tensor.data, before[tensor.name].data), tensor.name
    for key in ("general.file_type", "general.name"):
        fields = [reader.get_field(key) for reader in (plain, mixed)]
        assert fields[0] is not None and fields[1] is not None and fields[0].contents() == fields[1].contents()


def test_an_override_that_the_width_does_not_allow_is_named(test_data: Path, tmp_path: Path) -> None:
    checkpoint = test_data / "weights" / "stories260k-hf"
    artifact = export(checkpoint, tmp_path, "Q8_0", options=with_types(attn_v="Q6_K", ffn_down="Q4_0"))
    found = {f.tensor: f for f in artifact.fallbacks}
    assert (found["blk.0.attn_v.weight"].wanted, found["blk.0.attn_v.weight"].got) == ("Q6_K", "Q8_0")
    assert (found["blk.0.ffn_down.weight"].wanted, found["blk.0.ffn_down.weight"].got) == ("Q4_0", "F16")
    assert "64 columns are not a multiple of 256" in found["blk.0.attn_v.weight"].why


@pytest.mark.parametrize(
    ("types", "cause", "remedy"),
    [
        ({"attn_v": "Q4_K_M"}, "no ggml type 'Q4_K_M'", "e.g. Q4_K"),
        ({"attn_v": "Q4K"}, "no ggml type 'Q4K'", "did you mean 'Q4_K'"),
        ({"attn_vv": "Q4_K"}, "matches no matrix", "blk.N.attn_v.weight"),
        ({"_norm": "Q4_K"}, "matches no matrix", "output.weight"),
        ({"attn_(v": "Q4_K"}, "not a regular expression", "ffn_down"),
        ({"attn_v": "IQ2_XS"}, "blk.0.attn_v.weight is to be IQ2_XS", "--calibration"),
    ],
)
def test_overrides_that_cannot_be_are_refused_before_any_work(
    types: dict[str, str], cause: str, remedy: str, wide: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as refused:
        export(wide, tmp_path / "out", "Q4_K_M", options=with_types(**types))
    assert cause in refused.value.cause and remedy in refused.value.remedy
    assert not (tmp_path / "out").exists()


def test_what_llama_cpps_own_converter_wrote_is_quantized_too(wide: Path, tmp_path: Path) -> None:
    """Its tensors' torch names are not known: types by tensor work, importance matrices are refused."""
    export(wide, tmp_path / "source", "F16")
    script = tmp_path / "convert.py"
    given = str(tmp_path / "source" / "model.gguf")
    script.write_text(f"import shutil, sys\nshutil.copy({given!r}, sys.argv[sys.argv.index('--outfile') + 1])\n")
    options = ExportOptions(converter=script, tensor_types=(("attn_k", "Q8_0"),))
    artifact = export(wide, tmp_path / "out", "Q4_K_M", options=options)
    assert artifact.overrides == {f"blk.{layer}.attn_k.weight": "Q8_0" for layer in range(2)}
    assert types_in(tmp_path / "out")["blk.1.attn_k.weight"] == "Q8_0"
    assert any("without an importance matrix" in note for note in artifact.notes)
    for mix, types in (("IQ2_XS", ()), ("Q4_K_M", (("attn_k", "IQ1_S"),))):
        with pytest.raises(UserError, match="needs an importance matrix"):
            export(wide, tmp_path / "no", mix, options=ExportOptions(converter=script, tensor_types=types))
        assert not (tmp_path / "no").exists() or list((tmp_path / "no").iterdir()) == []


def test_nothing_is_left_on_failure(wide: Path, tmp_path: Path) -> None:
    broken = copy(wide, tmp_path / "broken")
    weights = (broken / "model.safetensors").read_bytes()
    # NaN as the last float32: found only when that tensor is reached, with most of the file written
    (broken / "model.safetensors").write_bytes(weights[:-4] + b"\x00\x00\xc0\x7f")
    with pytest.raises(UserError, match="NaN"):
        export(broken, tmp_path / "out", "Q8_0")
    assert list((tmp_path / "out").iterdir()) == []


def test_fallbacks_are_held_to_the_file() -> None:
    log = [
        "warning: a.weight   - ncols     64 not divisible by 256 (required for type  q4_K) -> falling back to    q5_0",
        "warning: gone.weight - ncols  64 not divisible by 256 (required for type  q4_K) -> falling back to    q5_0",
    ]
    types = {"a.weight": ("Q5_0", 64), "b.weight": ("F16", 256), "c.weight": ("Q4_K", 256)}
    found = fallbacks_of(types, log, quantization="Q4_K_M")
    assert [(f.tensor, f.wanted, f.got) for f in found] == [("a.weight", "Q4_K", "Q5_0"), ("b.weight", "Q4_K", "F16")]
