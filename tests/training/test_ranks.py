"""Several processes train as one does: data-parallel and sharded, and across a change of their number."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

STEPS = 20
RELATIVE = 1e-5
HELPERS = Path(__file__).resolve().parents[1] / "helpers"
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: pip install deepspeed"
)


def launch(folder: Path, mode: str, ranks: int, *, stop_at: int | None = None, steps: int = STEPS) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", "0",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
        str(HELPERS / "rank_script.py"), str(folder), mode, str(steps),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HELPERS}{os.pathsep}{HELPERS.parents[1]}"}
    done = subprocess.run(
        command + ([] if stop_at is None else [str(stop_at)]), env=environment, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def figures(folder: Path) -> list[list[float]]:
    return json.loads((folder / "losses.json").read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    launch(folder, "ddp", 1)
    return folder


def close(folder: Path, alone: Path) -> None:
    ours, reference = figures(folder), figures(alone)
    assert len(ours) == len(reference) == STEPS
    for row, expected in zip(ours, reference, strict=True):
        assert row == pytest.approx(expected, rel=RELATIVE, nan_ok=True)
    first, second = load_file(folder / "final.safetensors"), load_file(alone / "final.safetensors")
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-5)


def test_the_reference_learns(alone):
    losses = [loss for loss, _ in figures(alone)]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_ranks_give_the_losses_of_one(alone, tmp_path, mode):
    launch(tmp_path, mode, 2)
    close(tmp_path, alone)


@needs_deepspeed
@pytest.mark.parametrize("mode", ["zero1", "zero2", "zero3"])
def test_two_ranks_under_deepspeed_give_the_losses_of_one(alone, tmp_path, mode):
    launch(tmp_path, mode, 2)
    close(tmp_path, alone)


@needs_deepspeed
@pytest.mark.parametrize(
    ("before", "after"), [("zero2", "zero2"), ("zero3", "zero3"), ("zero3", "ddp"), ("fsdp", "zero2")]
)
def test_deepspeed_resumes_its_own_checkpoints_and_those_of_others(alone, tmp_path, before, after):
    launch(tmp_path, before, 2, stop_at=9)
    assert not (tmp_path / "losses.json").exists()
    launch(tmp_path, after, 2)
    close(tmp_path, alone)


@needs_deepspeed
@pytest.mark.parametrize("mode", ["zero2-skip", "zero3-skip"])
def test_deepspeed_forgets_the_gradients_of_a_bad_step(tmp_path, mode):
    launch(tmp_path / "one", "ddp-skip", 1)
    bad = [number for number, (loss, _) in enumerate(figures(tmp_path / "one")) if math.isnan(loss)]
    assert bad == [7]
    launch(tmp_path / "two", mode, 2)
    close(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize("mode", ["ddp-shard", "fsdp-shard"])
def test_a_sharded_teacher_gives_the_losses_of_a_whole_one(alone, tmp_path, mode):
    launch(tmp_path, mode, 2)
    close(tmp_path, alone)


@pytest.fixture(scope="module")
def alone_with_adapters(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    launch(folder, "ddp-lora", 1)
    return folder


@pytest.mark.parametrize("mode", ["fsdp-lora"])
def test_adapters_on_two_ranks_give_the_losses_and_the_merged_student_of_one(alone_with_adapters, tmp_path, mode):
    losses = figures(alone_with_adapters)
    assert losses[-1][0] < losses[0][0]
    launch(tmp_path, mode, 2)
    close(tmp_path, alone_with_adapters)


@pytest.mark.parametrize(("mode", "before", "after"), [("fsdp", 2, 1), ("fsdp", 1, 2)])
def test_resuming_with_another_number_of_ranks_gives_the_same_losses(alone, tmp_path, mode, before, after):
    launch(tmp_path, mode, before, stop_at=9)
    assert not (tmp_path / "losses.json").exists()
    assert list((tmp_path / "state").glob("step-*"))
    launch(tmp_path, mode, after)
    close(tmp_path, alone)
