"""bitsandbytes folders: what transformers opens scores as torch does with the stored weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoints import tiny, torch_logits, torch_model

from edgedistill.errors import UserError
from edgedistill.export.stage import write_artifact
from edgedistill.records.artifact import Artifact

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")


def exported(checkpoint: Path, out: Path, quantization: str) -> Artifact:
    return write_artifact(
        checkpoint, out, format_="bitsandbytes", quantization=quantization, context_tokens=128, name="tiny"
    )


@pytest.mark.parametrize(("quantization", "bits"), [("INT8", 12.0), ("NF4", 9.0)])
def test_a_folder_scores_as_its_stored_weights(tmp_path: Path, quantization: str, bits: float) -> None:
    from edgedistill.models.weights import read_tensor, stored_tensors
    from edgedistill.other_formats.bitsandbytes import dequantized

    checkpoint = tiny(tmp_path / "model", hidden_size=128, intermediate_size=256, head_dim=32)
    made = exported(checkpoint, tmp_path / "out", quantization)
    assert made.runtime == "transformers" and made.entry == "." and made.bits_per_weight < bits
    assert made.parity is not None and 0 < made.parity.relative_rms < 0.1
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["load_in_4bit"] is (quantization == "NF4")
    originals = {name: read_tensor(tensor) for name, tensor in stored_tensors(checkpoint).items()}
    stored = dict(dequantized(tmp_path / "out"))
    assert stored.keys() == originals.keys()
    for name, values in stored.items():
        error = np.linalg.norm(values - originals[name]) / np.linalg.norm(originals[name])
        assert error < (0.15 if quantization == "NF4" else 0.02), name


@pytest.mark.parametrize("quantization", ["INT8", "NF4"])
def test_transformers_alone_loads_and_scores_the_folder(tmp_path: Path, quantization: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    checkpoint = tiny(tmp_path / "model", hidden_size=128, intermediate_size=256, head_dim=32)
    exported(checkpoint, tmp_path / "out", quantization)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    ids = np.arange(1, 40)
    with torch.inference_mode():
        found = model(input_ids=torch.from_numpy(ids)[None].to(model.device)).logits[0].float().cpu().numpy()
    expected = torch_logits(torch_model(checkpoint), ids)
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > (0.8 if quantization == "NF4" else 0.99)


def test_a_width_that_nf4_dequantizes_wrongly_is_refused(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("only the CPU's kernel is wrong")
    checkpoint = tiny(tmp_path / "model", hidden_size=64, intermediate_size=96)
    with pytest.raises(UserError, match=r"down_proj takes 96 inputs.*multiple of 64"):
        exported(checkpoint, tmp_path / "out", "NF4")
    assert list((tmp_path / "out").iterdir()) == []
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_an_unknown_quantization_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no bitsandbytes quantization 'FP4'"):
        exported(tmp_path, tmp_path / "out", "FP4")
