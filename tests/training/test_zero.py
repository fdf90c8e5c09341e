"""DeepSpeed's configuration: what accelerate asks for is kept, what the recipe decides is refused."""

from __future__ import annotations

import importlib.util
import json

import pytest
from training_models import model, settings

from edgedistill.errors import UserError
from edgedistill.training.optimizers import make_optimizers
from edgedistill.training.ranks import ranks_here
from edgedistill.training.zero import configuration, start_engine


def asked(**changes):
    return configuration(settings(optimizer="adamw", clip_norm=0.5, **changes), micro_batch=3)


def test_accelerates_flags_are_kept(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu")
    made = asked()
    assert made["zero_optimization"] == {"stage": 3, "offload_optimizer": {"device": "cpu"}}
    assert made["gradient_clipping"] == 0.5
    assert made["train_micro_batch_size_per_gpu"] == 3
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "0")
    with pytest.raises(UserError, match="ZeRO stage 0"):
        asked()


def test_a_file_gives_zero_alone(monkeypatch, tmp_path):
    file = tmp_path / "deepspeed.json"
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    given = {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000, "overlap_comm": "auto"},
        "bf16": {"enabled": "auto"}, "fp16": {"enabled": False}, "gradient_clipping": 9,
    }  # fmt: skip
    file.write_text(json.dumps(given))
    made = asked()
    assert made["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000}
    assert made["gradient_clipping"] == 0.5
    for name, section in (("bf16", {"enabled": True}), ("optimizer", {"type": "Adam"})):
        file.write_text(json.dumps({**given, name: section}))
        with pytest.raises(UserError, match=f"sets {name}, which the recipe decides"):
            asked()


def test_one_process_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="there is one process, which trains without it"):
        ranks_here()


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="deepspeed is installed")
def test_deepspeed_that_is_missing_is_said(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"asks for DeepSpeed, which cannot be imported[\s\S]*pip install deepspeed"):
        ranks_here()


def test_what_deepspeed_does_not_train_here_is_refused():
    student = model()
    muon = settings(optimizer="muon")
    with pytest.raises(UserError, match="optimizer is muon"):
        start_engine(student, make_optimizers(student, muon), muon, 1)
    adamw = settings(optimizer="adamw")
    next(student.parameters()).requires_grad_(False)
    with pytest.raises(UserError, match="frozen weights"):
        start_engine(student, make_optimizers(student, adamw), adamw, 1)
