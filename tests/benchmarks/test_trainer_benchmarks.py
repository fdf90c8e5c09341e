"""What benchmarks/trainer.py and trainer_gpu.py count and compare: the same arithmetic, FLOPs as torch counts them."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from training_models import VOCAB, model, packed, same, settings
from transformers import LlamaForCausalLM

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
trainer_gpu, trainer_setup = (importlib.import_module(name) for name in ("trainer_gpu", "trainer_setup"))
sys.path.remove(str(BENCHMARKS))


def test_the_barest_loop_ends_with_the_trainers_bytes(tmp_path):
    """Otherwise it is no measure of the trainer's overhead; the loop with all logits differs by rounding alone."""
    steps, teacher = 5, model(seed=5, hidden=48).eval().requires_grad_(False)
    asked = settings(tokens=steps * 4 * 16, optimizer="adamw", evaluate_every_share=1.0)
    trained, bare, full = model(), model(), model()
    result, spent = trainer_setup.our_loop(trained, teacher, packed(), asked, VOCAB, tmp_path)
    _, loss = trainer_setup.bare_loop(bare, teacher, packed(), asked, steps, VOCAB, trainer_setup.fused_loss)
    trainer_setup.bare_loop(full, teacher, packed(), asked, steps, VOCAB, trainer_setup.full_logits_loss)
    assert same(trained, bare)
    assert not same(trained, model())
    assert result.history[-1]["loss"] == pytest.approx(loss, rel=1e-6)
    assert spent["save_best"] > 0
    for a, b in zip(trained.parameters(), full.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_job_holds_the_rows_in_the_trainers_order(tmp_path):
    asked = settings(tokens=3 * 4 * 16, optimizer="adamw")
    student = model()
    folder = trainer_setup.write_job(
        tmp_path / "job", student=student, teacher=tmp_path, data=packed(), settings=asked, steps=3, device="cpu",
        vocab=VOCAB,
    )  # fmt: skip
    rows, job = np.load(folder / "rows.npy"), json.loads((folder / "job.json").read_text())
    order = packed().order(0)
    assert np.array_equal(rows, packed().sequence_ids(order[:12]))
    assert len(job["rates"]) == 3
    assert set(job["decayed"]) == {n for n, p in student.named_parameters() if ".layers." in n and p.ndim == 2}
    assert same(LlamaForCausalLM.from_pretrained(folder / "student"), student)


def test_ratios_are_paired():
    ratio = trainer_setup.paired([10.0, 20.0, 40.0], [5.0, 10.0, 20.0])
    assert (ratio.value, ratio.pairs, str(ratio)) == (2.0, 3, "2.000 [too few]")
    ratio = trainer_setup.paired([10.0, 20.0, 40.0, 6.0, 8.0], [5.0, 10.0, 20.0, 3.0, 4.0])
    assert (ratio.value, ratio.low, ratio.high, ratio.pairs) == (2.0, 2.0, 2.0, 5)


@pytest.mark.parametrize("backward", [False, True])
def test_flops_are_those_that_torch_counts(backward):
    """All of the attention's square: torch counts it whole. A backward pass is two forward passes."""
    shape = trainer_gpu.config(trainer_gpu.TINY, 512, 32)
    shape._attn_implementation = "eager"
    student = LlamaForCausalLM(shape)
    ids = torch.zeros(2, 32, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        logits = student(ids).logits
        if backward:
            logits.sum().backward()
    expected = trainer_gpu.forward_flops(shape, 32, causal=False) * (3 if backward else 1) * ids.numel()
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-12)
    squares = shape.num_hidden_layers * 2 * 32 * shape.num_attention_heads * shape.head_dim
    assert trainer_gpu.forward_flops(shape, 32) == trainer_gpu.forward_flops(shape, 32, causal=False) - squares


def test_the_gpu_models_have_the_sizes_that_are_claimed():
    shapes = [trainer_gpu.config(s, trainer_gpu.VOCAB, 2048) for s in (trainer_gpu.STUDENT, trainer_gpu.TEACHER)]
    with torch.device("meta"):
        student, teacher = (LlamaForCausalLM(shape).num_parameters() for shape in shapes)
    assert (round(student / 1e9, 1), round(teacher / 1e9, 1)) == (0.4, 1.5)
    # without attention: six FLOPs a trained weight and token, two a frozen one
    assert trainer_gpu.step_flops(*shapes, context=0) == pytest.approx(6 * student + 2 * teacher, rel=1e-3)


def gpu_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(BENCHMARKS / "trainer_gpu.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_without_a_gpu_it_says_so_and_ends_with_2():
    done = gpu_script()
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
    assert not done.stdout


def test_the_gpu_script_goes_through_on_a_cpu_with_tiny_models():
    done = gpu_script(
        "--device", "cpu", "--tiny", "--context", "32", "--batch", "4", "--micro-batch", "2", "--steps", "3",
        "--warm-up", "1", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)["figures"]
    ours = figures["results"]["ours"]
    rate = ours["tokens_per_s"] * figures["flops_a_token"] / figures["matrix_flops_a_second"]
    assert ours["model_flops_utilisation"] == pytest.approx(rate)
    assert 0 < rate < 1
    assert ours["micro_batch_sequences"] == 2
    assert ours["tokens_per_s"] * ours["seconds"] == pytest.approx(3 * 4 * 32)


def test_no_result_of_a_cpu_is_saved():
    done = gpu_script("--device", "cpu", "--tiny", "--save")
    assert done.returncode == 2
    assert "not saved" in done.stderr
