"""Training: exact resume, accumulation, early stopping, signals."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from training_models import KL, VOCAB, documents, model, packed, run, same, settings

from edgedistill.config.recipe import Training
from edgedistill.errors import EdgedistillError, UserError
from edgedistill.losses.losses import LossSpec
from edgedistill.losses.model_parts import final_hidden
from edgedistill.signals.signals import LiveSignals, MixedSignals, cache_hidden
from edgedistill.tasks.causal_lm import pack
from edgedistill.teacher.live import offloaded
from edgedistill.training.ranks import ranks_here
from edgedistill.training.step import Step
from edgedistill.training.trainer import rate_share, total_steps


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adamw8bit"])
def test_resume_from_any_step_gives_the_same_bytes(tmp_path, monkeypatch, optimizer, precision):
    width = 64  # narrower matrices are not kept in 8 bits
    straight = model(hidden=width)
    expected = run(straight, tmp_path / "straight", optimizer=optimizer, precision=precision)

    class Killed(Exception):
        pass

    original = Step.run
    for stop_at in (1, 5, 11):
        state = tmp_path / f"stop{stop_at}"
        calls = []

        def dying(*args, calls=calls, stop_at=stop_at, **named):
            if len(calls) == stop_at:
                raise Killed
            calls.append(1)
            return original(*args, **named)

        monkeypatch.setattr(Step, "run", dying)
        with pytest.raises(Killed):
            run(model(hidden=width), state, optimizer=optimizer, precision=precision, checkpoint_every_s=1e-9)
        monkeypatch.setattr(Step, "run", original)
        resumed = model(seed=99, hidden=width)
        result = run(resumed, state, optimizer=optimizer, precision=precision, checkpoint_every_s=1e-9)
        assert same(straight, resumed), f"resumed at step {stop_at}"
        assert [r["perplexity"] for r in result.history] == [r["perplexity"] for r in expected.history]


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
    cached = cache_hidden(teacher, data, folder=tmp_path / "cache", low_precision=False)
    rows = np.array([3, 0, data.sequences - 1])
    inputs = torch.from_numpy(data.sequence_ids(rows)[:, :-1])
    a, b = live.batch(rows, inputs), cached.batch(rows, inputs)
    torch.testing.assert_close(a.hidden, b.hidden.float(), rtol=1e-2, atol=1e-2)
    assert torch.equal(a.head.weight, b.head.weight)


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


def test_a_spike_is_skipped_where_told_to_and_its_batch_is_kept(tmp_path, monkeypatch):
    original = Step._gradients

    def leaping(self, rows, *rest):
        sums, valid = original(self, rows, *rest)
        if len(calls) == 20:
            sums = {**sums, "loss": 1e6}
        calls.append(rows.tolist())
        return sums, valid

    monkeypatch.setattr(Step, "_gradients", leaping)
    calls: list[list[int]] = []
    with pytest.raises(EdgedistillError, match="more than 20 times the median"):
        run(model(), tmp_path / "stop", tokens=16 * 4 * 30)
    calls.clear()
    result = run(model(), tmp_path / "skip", tokens=16 * 4 * 30, on_bad_step="skip")
    assert result.skipped_steps == [20]
    assert result.steps == 30
    kept = json.loads((tmp_path / "skip" / "bad-step-000000020.json").read_text())
    assert kept["sequences"] == calls[20]
    assert kept["token_ids"] == packed().sequence_ids(np.array(calls[20])).tolist()


def test_a_skipped_step_changes_no_weight(tmp_path, monkeypatch):
    """Every step but the last is a spike of NaN: after as many in a row as are borne, it stops."""
    original = Step._gradients
    monkeypatch.setattr(
        Step, "_gradients", lambda self, *rest: ({**original(self, *rest)[0], "loss": float("nan")}, 64)
    )
    student, untouched = model(), model()
    with pytest.raises(EdgedistillError, match="10 steps in a row were skipped already"):
        run(student, tmp_path, on_bad_step="skip")
    assert same(student, untouched)
    with pytest.raises(EdgedistillError, match="each of its 6 steps was skipped"):
        run(student, tmp_path / "short", tokens=16 * 4 * 6, on_bad_step="skip")


def shorten_memory(student, most: int) -> None:
    """In training, more than `most` sequences make torch's CPU allocator fail: it is asked for too much."""

    def hook(module, arguments):
        if module.training and len(arguments[0]) > most:
            torch.empty(1 << 60)

    student.model.layers[0].register_forward_pre_hook(hook)


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_batch(tmp_path):
    whole, short = model(), model()
    expected = run(whole, tmp_path / "whole", tokens=16 * 4 * 3, optimizer="adamw", micro_batch_sequences=1)
    shorten_memory(short, most=1)
    result = run(short, tmp_path / "short", tokens=16 * 4 * 3, optimizer="adamw")
    assert result.micro_batch_sequences == 1
    assert result.history[-1]["loss"] == pytest.approx(expected.history[-1]["loss"], rel=1e-6)
    assert same(whole, short)


def test_out_of_memory_with_one_sequence_says_what_to_do(tmp_path):
    student = model()
    shorten_memory(student, most=0)
    with pytest.raises(UserError, match="activation_checkpointing"):
        run(student, tmp_path)


def test_documents_see_themselves_alone(tmp_path):
    """The packed hidden states of each document equal those of the document by itself; its first token is no target."""
    texts = documents(6)
    data = pack(texts, context=40, seed=1, eos=None, bos=None)
    rows = np.arange(data.sequences)
    student = model().eval()
    inputs, positions = torch.from_numpy(data.sequence_ids(rows)[:, :-1]), torch.from_numpy(data.positions(rows))
    with torch.no_grad():
        together = final_hidden(student, inputs, False, positions).view(len(rows), 40, -1)
        crossed = final_hidden(student, inputs, False).view(len(rows), 40, -1)
        for row in range(len(rows)):
            begins = [0, *[i for i in range(1, 40) if positions[row, i] == 0], 40]
            for first, last in itertools.pairwise(begins):
                single = final_hidden(student, inputs[row : row + 1, first:last], False)
                torch.testing.assert_close(together[row, first:last], single, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together, crossed, atol=1e-3)
    masked = np.argwhere(data.targets(rows, documents=True) == -100)
    assert [(r * 40 + c + 1) for r, c in masked] == [s for s in data.starts.tolist() if 0 < s <= data.sequences * 40]
    run(model(), tmp_path, data=pack(texts, context=16, seed=1, eos=None, bos=None), attention="documents")


def test_an_offloaded_teacher_gives_what_it_gave_before():
    """Its weights lie on no device: hooks fetch a layer's when it runs, here to the CPU itself."""
    data = packed()
    inputs = torch.from_numpy(data.sequence_ids(np.arange(3))[:, :-1])
    plain = LiveSignals(model(seed=5, hidden=48), low_precision=False)
    away = offloaded(model(seed=5, hidden=48), torch.device("cpu"), low_precision=False, name="offloaded")
    assert next(away.teacher.parameters()).device.type == "meta"
    a, b = plain.batch(np.arange(3), inputs), away.batch(np.arange(3), inputs)
    assert torch.equal(a.hidden, b.hidden)
    assert torch.equal(a.head.weight, b.head.weight)
    assert torch.equal(plain.layers(inputs, None, [1], [])[0][1], away.layers(inputs, None, [1], [])[0][1])


def test_several_teachers_average_their_probabilities(tmp_path):
    first, second = model(seed=5, hidden=48), model(seed=6, hidden=40)
    one, other = (LiveSignals(m, low_precision=False) for m in (first, second))
    student = model(seed=7)
    result = run(student, tmp_path / "both", loss=KL, signals=MixedSignals([(one, 0.5), (other, 0.5)]), tokens=16 * 4)
    ids = torch.from_numpy(packed().sequence_ids(packed().order(0)[:4])[:, :-1])
    with torch.no_grad():
        p = 0.5 * first(ids).logits.softmax(-1) + 0.5 * second(ids).logits.softmax(-1)
        q = model(seed=7)(ids).logits.log_softmax(-1)
    assert result.history[0]["loss"] == pytest.approx(float((p * (p.log() - q)).sum(-1).mean()), rel=1e-4)


def test_taid_moves_from_the_student_to_the_teacher(tmp_path, monkeypatch):
    shares = []
    original = Step.run
    monkeypatch.setattr(
        Step,
        "run",
        lambda self, rows, **named: (shares.append(named["taid_t"]), original(self, rows, **named))[1],
    )
    spec = LossSpec({"taid": 1.0}, temperature=1.0, vocab=VOCAB)
    run(model(), tmp_path, loss=spec, signals=LiveSignals(model(seed=5), low_precision=False), taid=(0.3, 1.0))
    assert shares[0] == 0.3
    assert shares == sorted(shares)
    linear = [0.3 + 0.7 * step / 12 for step in range(12)]
    assert all(ours >= theirs for ours, theirs in zip(shares, linear, strict=True))


def test_activation_checkpointing_and_8_bit_optimizer_train(tmp_path):
    plain, recomputed = model(), model()
    run(plain, tmp_path / "a", optimizer="adamw")
    run(recomputed, tmp_path / "b", optimizer="adamw", activation_checkpointing=True)
    for a, b in zip(plain.parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    result = run(model(), tmp_path / "c", optimizer="adamw8bit", tokens=16 * 4 * 40, learning_rate=0.01)
    assert result.history[-1]["loss"] < 0.9 * result.history[0]["loss"]


def test_the_tracker_logs_every_step(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    teacher = LiveSignals(model(seed=5, hidden=48), low_precision=False)
    spec = LossSpec({"reverse_kl": 1.0, "cross_entropy": 0.5}, temperature=2.0, vocab=VOCAB)
    result = run(model(), tmp_path / "state", loss=spec, signals=teacher, logs=tmp_path / "logs")
    events = EventAccumulator(str(tmp_path / "logs" / "train"))
    events.Reload()
    names = events.Tags()["scalars"]
    assert {"loss/total", "loss/reverse_kl", "loss/cross_entropy", "gradient_norm", "tokens_per_s", "memory_bytes"} <= {
        *names
    }
    assert len(events.Scalars("loss/total")) == 12
    assert events.Scalars("loss/kl")[0].step == 1
    logged = [round(event.value, 4) for event in events.Scalars("loss/total")]
    assert logged[-1] == round(result.history[-1]["loss"], 4)
    assert len(set(logged)) > 6
    with pytest.raises(UserError, match="did you mean 'tensorboard'"):
        run(model(), tmp_path / "other", logs=tmp_path / "logs", tracker="tensorbord")


def test_a_batch_that_ranks_cannot_share_is_refused(tmp_path, monkeypatch):
    from dataclasses import replace

    with pytest.raises(UserError, match="3 ranks cannot share evenly"):
        run(model(), tmp_path, ranks=replace(ranks_here(), world=3))


def test_what_is_masked_is_the_token_that_is_predicted(tmp_path):
    """DistillKit masks logits[t] by labels[t], one too early."""
    data = pack(documents(6), context=16, seed=1, eos=None, bos=None)
    teacher, student = model(seed=5, hidden=48), model(seed=7)
    rows = next(data.batches(4, 0))
    ids, positions = data.sequence_ids(rows), torch.from_numpy(data.positions(rows))
    with torch.no_grad():
        # with a cache, transformers does not see that documents are packed
        inputs = {"input_ids": torch.from_numpy(ids[:, :-1]), "position_ids": positions, "use_cache": False}
        p, q = (each.eval()(**inputs).logits.log_softmax(-1) for each in (teacher, student))
    kl = (p.exp() * (p - q)).sum(-1)
    firsts = set(data.starts.tolist())
    predicts_a_first = torch.tensor([[int(row) * 16 + t + 1 in firsts for t in range(16)] for row in rows])
    is_a_first = torch.tensor([[int(row) * 16 + t in firsts for t in range(16)] for row in rows])
    assert 0 < predicts_a_first.sum() < 8
    result = run(
        model(seed=7), tmp_path, loss=KL, signals=LiveSignals(teacher, low_precision=False), data=data, tokens=16 * 4,
        attention="documents",
    )  # fmt: skip
    assert result.history[0]["loss"] == pytest.approx(float(kl[~predicts_a_first].mean()), rel=1e-4)
    assert float(kl[~is_a_first].mean()) != pytest.approx(float(kl[~predicts_a_first].mean()), rel=1e-3)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch's inductor warns of torch itself
def test_a_compiled_body_trains_the_same_and_is_compiled_once(tmp_path):
    """Windows of many lengths are evaluated without compiling each."""
    from torch._dynamo.utils import counters

    plain, compiled = model(), model()
    expected = run(plain, tmp_path / "plain", optimizer="adamw")
    counters.clear()
    result = run(compiled, tmp_path / "compiled", optimizer="adamw", compile=True)
    assert counters["stats"]["unique_graphs"] == 1
    assert result.history[-1]["loss"] == pytest.approx(expected.history[-1]["loss"], rel=1e-4)
    for a, b in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_compile_without_a_compiler_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"no C\+\+ compiler"):
        run(model(), tmp_path / "state", compile=True)


def test_a_step_reads_the_device_once(tmp_path, monkeypatch):
    """Every read makes a GPU's host wait for it: the figures of a step come in one."""
    reads: list[str] = []
    for name in ("tolist", "item", "__float__", "__int__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, name=name, original=original: (reads.append(name), original(self))[1]
        )
    original_step, each = Step.run, []

    def counted(self, rows, **named):
        reads.clear()
        done = original_step(self, rows, **named)
        each.append(list(reads))
        return done

    monkeypatch.setattr(Step, "run", counted)
    signals = LiveSignals(model(seed=5, hidden=48), low_precision=False)
    run(model(), tmp_path, loss=KL, signals=signals, optimizer="adamw", micro_batch_sequences=2)
    assert each == [["tolist"]] * 12


def test_what_was_logged_before_an_error_is_on_disk(tmp_path):
    """The process ends in the middle of training: its steps are in the log."""
    script = (
        "import sys, itertools; from pathlib import Path; from training_models import model, run\n"
        "from edgedistill.training import trackers\nfrom edgedistill.training.step import Step\n"
        "trackers.FLUSH_EVERY_S = 1e9\n"
        "original, calls = Step.run, itertools.count()\n"
        "def dying(*a, **n):\n"
        "    if next(calls) == 5: raise SystemExit(7)\n"
        "    return original(*a, **n)\n"
        "Step.run = dying\n"
        "run(model(), Path(sys.argv[1]) / 'state', logs=Path(sys.argv[1]) / 'logs')\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=environment)
    assert done.returncode == 7
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "logs" / "train"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss/total")] == [1, 2, 3, 4, 5]
