"""Training: exact resume, accumulation, early stopping, signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from edgedistill.distill.losses import LossSpec
from edgedistill.distill.signals import CachedSignals, LiveSignals
from edgedistill.distill.trainer import rate_share, total_steps, train
from edgedistill.errors import EdgedistillError
from edgedistill.recipe import Training
from edgedistill.tasks.causal_lm import Packed, pack, scoring_windows

VOCAB = 64


def model(seed: int = 0, hidden: int = 32) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True,
        )
    )  # fmt: skip


def documents(count: int = 40) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [np.cumsum(rng.integers(0, 3, size=60)).astype(np.int32) % VOCAB for _ in range(count)]


def packed() -> Packed:
    return pack(documents(), context=16, seed=1, eos=None, bos=None)


def settings(**changes) -> Training:
    base = {"tokens": 16 * 4 * 12, "context_tokens": 16, "batch_sequences": 4, "optimizer": "muon", "precision": "fp32"}
    return Training(**{**base, **changes})


CE = LossSpec(forward_kl=0.0, cross_entropy=1.0, temperature=1.0, vocab=VOCAB)
KL = LossSpec(forward_kl=1.0, cross_entropy=0.0, temperature=1.0, vocab=VOCAB)


def run(student, state: Path, loss=CE, signals=None, **changes):
    windows = scoring_windows(documents(4), context=16, stride=None, max_tokens=None)
    return train(
        student,
        data=packed(),
        evaluation=windows,
        settings=settings(**changes),
        loss=loss,
        signals=signals,
        state=state,
    )


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resume_from_any_step_gives_the_same_bytes(tmp_path, monkeypatch, optimizer, precision):
    straight = model()
    expected = run(straight, tmp_path / "straight", optimizer=optimizer, precision=precision)
    from edgedistill.distill import trainer

    class Killed(Exception):
        pass

    original = trainer._step
    for stop_at in (1, 5, 11):
        state = tmp_path / f"stop{stop_at}"
        calls = []

        def dying(*args, calls=calls, stop_at=stop_at):
            if len(calls) == stop_at:
                raise Killed
            calls.append(1)
            return original(*args)

        monkeypatch.setattr(trainer, "_step", dying)
        with pytest.raises(Killed):
            run(model(), state, optimizer=optimizer, precision=precision, checkpoint_every_s=1e-9)
        monkeypatch.setattr(trainer, "_step", original)
        resumed = model(seed=99)
        result = run(resumed, state, optimizer=optimizer, precision=precision, checkpoint_every_s=1e-9)
        assert same(straight, resumed), f"resumed at step {stop_at}"
        assert [r["perplexity"] for r in result.history] == [r["perplexity"] for r in expected.history]


SCRIPT = """
import sys, os
from pathlib import Path
sys.path[:0] = {path!r}
import torch
torch.set_num_threads(1)
from test_trainer import model, run
student = model()
run(student, Path({state!r}), checkpoint_every_s=1e-9, tokens=16 * 4 * 60)
from safetensors.torch import save_file
save_file({{k: v.contiguous() for k, v in dict(student.named_parameters()).items()}}, {out!r})
"""


def test_sigkill_during_training_and_its_checkpoint_writes_loses_nothing(tmp_path, repository):
    """Killed again and again at growing delays until it ends by itself; the weights equal an undisturbed run's."""
    here = str(Path(__file__).parent)

    def script(name: str) -> list[str]:
        text = SCRIPT.format(path=[here, str(repository)], state=str(tmp_path / name), out=str(tmp_path / f"{name}.st"))
        return [sys.executable, "-c", textwrap.dedent(text)]

    subprocess.run(script("straight"), check=True)
    kills = 0
    for _ in range(40):
        process = subprocess.Popen(script("killed"))
        checkpoints = tmp_path / "killed"
        before = {p.name for p in checkpoints.glob("step-*")} if checkpoints.exists() else set()
        try:
            while process.poll() is None:
                now = {p.name for p in checkpoints.glob("step-*")} if checkpoints.exists() else set()
                if (
                    len({int(n[5:]) for n in now} - {int(n[5:]) for n in before})
                    and max(int(n[5:]) for n in now) >= max([int(n[5:]) for n in before], default=0) + 11
                ):
                    os.kill(process.pid, signal.SIGKILL)
                    kills += 1
                    break
        finally:
            process.wait()
        if process.returncode == 0:
            break
    assert kills >= 3
    first, second = load_file(tmp_path / "straight.st"), load_file(tmp_path / "killed.st")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_micro_batches_give_the_whole_batchs_step(tmp_path):
    whole, parts = model(), model()
    run(whole, tmp_path / "a", tokens=16 * 4 * 2, optimizer="adamw")
    run(parts, tmp_path / "b", tokens=16 * 4 * 2, optimizer="adamw", micro_batch_sequences=1)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_distilling_pulls_the_student_to_its_teacher(tmp_path):
    teacher = model(seed=5, hidden=48)
    run(teacher, tmp_path / "teacher", tokens=16 * 4 * 60)
    student = model(seed=7)
    before = _kl(teacher, student)
    run(student, tmp_path / "student", loss=KL, signals=LiveSignals(teacher, low_precision=False), tokens=16 * 4 * 60)
    assert _kl(teacher, student) < 0.5 * before
    assert not any(p.requires_grad for p in teacher.parameters())


def test_cached_signals_are_the_live_ones(tmp_path):
    teacher = model(seed=5, hidden=48)
    data = packed()
    live = LiveSignals(teacher, low_precision=False)
    cached = CachedSignals(teacher, data, folder=tmp_path, low_precision=False)
    rows = np.array([3, 0, data.sequences - 1])
    inputs = torch.from_numpy(data.sequence_ids(rows)[:, :-1])
    a, b = live.head(rows, inputs), cached.head(rows, inputs)
    torch.testing.assert_close(a.hidden, b.hidden.float(), rtol=1e-2, atol=1e-2)
    assert torch.equal(a.weight, b.weight)
    stamp = (tmp_path / "hidden.bf16").stat().st_mtime_ns
    CachedSignals(teacher, data, folder=tmp_path, low_precision=False)
    assert (tmp_path / "hidden.bf16").stat().st_mtime_ns == stamp


def test_early_stopping_keeps_the_best_weights(tmp_path):
    student = model()
    result = run(student, tmp_path, tokens=16 * 4 * 200, learning_rate=0.5, muon_learning_rate=0.5, patience=2)
    assert result.stopped_early
    assert result.steps < 200
    values = {row["step"]: row["perplexity"] for row in result.history}
    assert values[float(result.best_step)] == min(values.values())


def test_a_loss_that_is_not_finite_stops_with_what_it_was(tmp_path):
    student = model()
    with torch.no_grad():
        student.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(EdgedistillError, match="step 0 has a loss of nan"):
        run(student, tmp_path)


def test_schedule_and_steps():
    asked = settings(warmup_share=0.25, final_rate_share=0.1)
    rates = [rate_share(step, 100, asked) for step in range(100)]
    assert rates[:26] == sorted(rates[:26])
    assert rates[26:] == sorted(rates[26:], reverse=True)
    assert max(rates) == pytest.approx(1.0, abs=1e-3)
    assert rates[-1] == pytest.approx(0.1, abs=1e-2)
    data = packed()
    assert total_steps(Training(epochs=2, context_tokens=16, batch_sequences=4), data) == round(data.sequences / 2)


@torch.no_grad()
def _kl(teacher, student) -> float:
    ids = torch.from_numpy(packed().sequence_ids(np.arange(20))[:, :-1])
    p = torch.log_softmax(teacher(ids).logits, -1)
    q = torch.log_softmax(student(ids).logits, -1)
    return float((p.exp() * (p - q)).sum(-1).mean())
