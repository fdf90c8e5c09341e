"""GGUF parity: the figures of right files, and broken ones whose error names the tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import copy, edit_json, tiny
from family_models import DECODERS, ENCODERS, family

from edgedistill.errors import UserError
from edgedistill.export.stage import write_artifact
from edgedistill.gguf.layers import FLOAT_LIMIT, QUANTIZED_LIMIT, check_gguf
from edgedistill.gguf.quantize import export_gguf
from edgedistill.runtimes.parity import Differences


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("parity")
    return {name: tiny(root / name, name, num_hidden_layers=3) for name in ("llama", "qwen2", "qwen3")}


def exported(checkpoint: Path, out: Path, quantization: str = "F16") -> Path:
    export_gguf(checkpoint, out, quantization=quantization, context_tokens=128, threads=1, name="tiny")
    return out / "model.gguf"


def checked(checkpoint: Path, gguf: Path, quantization: str = "F16", **changes: Any) -> Any:
    return check_gguf(checkpoint, gguf, quantization=quantization, context_tokens=128, **changes)


def tensor(gguf: Path, name: str) -> np.memmap[Any, Any]:
    """A writable view of a tensor's bytes in the file."""
    from gguf import GGUFReader

    found = next(t for t in GGUFReader(gguf, "r+").tensors if t.name == name)
    return found.data  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("quantization", ["F16", "Q8_0", "Q4_0"])
def test_every_export_records_its_parity(
    checkpoints: dict[str, Path], kind: str, quantization: str, tmp_path: Path
) -> None:
    made = write_artifact(
        checkpoints[kind], tmp_path, format_="gguf", quantization=quantization, context_tokens=128, name="tiny"
    )
    parity = made.parity
    assert parity is not None and parity.reference == "stored"
    assert 0 < parity.relative_rms < parity.limit == (FLOAT_LIMIT if quantization == "F16" else QUANTIZED_LIMIT)
    assert 0 < parity.mean_abs_difference < parity.max_abs_difference
    assert parity.greedy_tokens == 16
    if quantization == "F16":
        assert parity.greedy_tokens_equal == parity.greedy_compared > 8


@pytest.mark.parametrize("quantization", ["F16", "Q8_0"])
def test_a_scaled_tensor_is_named(checkpoints: dict[str, Path], quantization: str, tmp_path: Path) -> None:
    gguf = exported(checkpoints["llama"], tmp_path, quantization)
    data = tensor(gguf, "blk.1.ffn_down.weight")
    if quantization == "F16":
        data *= np.float16(1.1)
    else:  # a Q8_0 block is a float16 scale and 32 bytes
        blocks = data.reshape(-1, 34)
        blocks[:, :2] = (blocks[:, :2].copy().view(np.float16) * np.float16(1.1)).view(np.uint8)
    data.flush()
    with pytest.raises(UserError, match=r"blk\.1\.ffn_down\.weight \(.*1\.100 times"):
        checked(checkpoints["llama"], gguf, quantization)


def test_rows_of_q_in_torchs_order_are_named(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """llama.cpp rotates neighbouring rows: a converter that forgot to permute them writes another model."""
    from edgedistill.models.architectures import from_interleaved

    gguf = exported(checkpoints["llama"], tmp_path)
    data = tensor(gguf, "blk.0.attn_q.weight")
    data[:] = from_interleaved(np.array(data), 4)
    data.flush()
    with pytest.raises(UserError, match=r"blk\.0\.attn_q\.weight"):
        checked(checkpoints["llama"], gguf)


def test_another_rotation_is_found_where_attention_first_uses_it(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """The weights are right and the metadata is not: only running it tells, and bisecting says where."""
    gguf = exported(checkpoints["llama"], tmp_path / "out")
    other = copy(checkpoints["llama"], tmp_path / "other")
    edit_json(other / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 3.0})
    with pytest.raises(UserError, match=r"the first tensor that departs is kqv_out-0.*all before it, up to Vcur-0"):
        checked(other, gguf)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_another_epsilon_is_found_at_the_first_norm(checkpoints: dict[str, Path], kind: str, tmp_path: Path) -> None:
    gguf = exported(checkpoints[kind], tmp_path / "out")
    other = copy(checkpoints[kind], tmp_path / "other")
    edit_json(other / "config.json", rms_norm_eps=0.5)
    with pytest.raises(UserError, match=r"the first tensor that departs is attn_norm-0 \(blk\.0\.attn_norm\.weight\)"):
        checked(other, gguf)


def test_the_trace_agrees_with_torch_tensor_by_tensor(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    from edgedistill.gguf.dequantize import dequantized
    from edgedistill.gguf.layers import _torch_stages
    from edgedistill.runtimes.process import RuntimeProcess
    from edgedistill.runtimes.runners import with_weights

    for kind in ("llama", "qwen2", "qwen3"):
        gguf = exported(checkpoints[kind], tmp_path / kind, "F32")
        ids = np.arange(1, 40)
        expected = _torch_stages(with_weights(checkpoints[kind], dequantized(gguf)), checkpoints[kind], ids)
        best: dict[str, float] = {}
        with RuntimeProcess("llama.cpp", gguf, threads=1, context_tokens=64) as process:
            before = process.logits(ids)
            for name, flat in process.trace(ids, list(expected)):
                if flat.size == expected[name].size:
                    found = Differences()
                    found.add(flat.reshape(expected[name].shape), expected[name])
                    best[name] = min(best.get(name, 9.0), found.relative_rms)
            assert np.array_equal(process.logits(ids), before)
        missing = {name.partition("-")[0] for name in expected} - {name.partition("-")[0] for name in best}
        assert missing <= {"ffn_gate", "ffn_up", "kqv_out", "attn_out"}, (kind, missing)
        assert len(expected) == 3 * 11 + 2
        assert max(best.values()) < 5e-3, (kind, best)


def test_calibration_text_is_what_parity_runs_on(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    gguf = exported(checkpoints["llama"], tmp_path)
    parity = checked(checkpoints["llama"], gguf, calibration=[["lily loved to play outside", "and more"]])
    assert parity.inputs.startswith("1 sequences") and parity.inputs.endswith("calibration text")


def test_a_value_that_is_no_number_is_an_infinite_difference() -> None:
    found = Differences()
    found.add(np.array([[1.0, np.nan]], dtype=np.float32), np.array([[1.0, 2.0]], dtype=np.float32))
    assert found.relative_rms == float("inf")


@pytest.mark.parametrize("case", [*DECODERS, *ENCODERS])
def test_every_family_is_held_to_torch(case: str, tmp_path: Path) -> None:
    """The export's own check passes, and no tensor on the way is taken for another."""
    from edgedistill.gguf.dequantize import dequantized
    from edgedistill.gguf.layers import _torch_stages
    from edgedistill.runtimes.process import RuntimeProcess
    from edgedistill.runtimes.runners import with_weights

    model = family(tmp_path / "model", *(DECODERS | ENCODERS)[case])
    gguf = exported(model, tmp_path / "out", "F32")
    assert checked(model, gguf, "F32").relative_rms < 2e-3
    ids = np.arange(1, 60)
    expected = _torch_stages(with_weights(model, dequantized(gguf), encoder=case in ENCODERS), model, ids)
    best: dict[str, float] = {}
    with RuntimeProcess("llama.cpp", gguf, threads=1, context_tokens=64, use_extra_bufts=False) as process:
        for name, flat in process.trace(ids, list(expected)):
            if flat.size == expected[name].size:
                found = Differences()
                found.add(flat.reshape(expected[name].shape), expected[name])
                best[name] = min(best.get(name, 9.0), found.relative_rms)
    assert len(best) > len(expected) * 3 // 4
    assert max(best.values()) < 5e-3, best


@pytest.mark.parametrize(
    ("case", "change", "named"),
    [
        ("gemma2, small caps", {"attn_logit_softcapping": 2.0}, "kqv_out-0"),
        ("granite", {"residual_multiplier": 0.5}, "ffn_norm-0"),
        ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 3.0}}, "kqv_out-0"),
        ("gpt2", {"layer_norm_epsilon": 0.5}, "attn_norm-0"),
        ("bert", {"layer_norm_eps": 0.5}, "Qcur-0"),
        ("nomic-bert", {"rope_parameters": {"rope_type": "default", "rope_theta": 3.0}}, "kqv_out-0"),
    ],
)
def test_other_metadata_is_found_in_every_kind_of_family(
    case: str, change: dict[str, Any], named: str, tmp_path: Path
) -> None:
    model = family(tmp_path / "model", *(DECODERS | ENCODERS)[case])
    gguf = exported(model, tmp_path / "out")
    edit_json(model / "config.json", **change)
    with pytest.raises(UserError, match=f"the first tensor that departs is {named}"):
        checked(model, gguf)


def test_the_embedding_that_ships_is_checked(tmp_path: Path) -> None:
    model = family(tmp_path / "model", *ENCODERS["bert"])
    made = write_artifact(model, tmp_path / "out", format_="gguf", quantization="Q8_0", context_tokens=128, name="tiny")
    assert made.task == "embedding" and made.speed is None
    assert made.parity is not None and made.parity.greedy_tokens is None
    assert 0 < made.parity.relative_rms < QUANTIZED_LIMIT
