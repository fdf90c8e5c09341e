"""A disk that is really full, while a checkpoint or the teacher's signals are written: said, and nothing lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import Command, refused
from test_signal_cache import build
from training_models import model, packed, run, same

from edgedistill.errors import UserError
from edgedistill.signals import cache
from edgedistill.training.checkpoint import save_checkpoint

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not sys.platform.startswith("linux"), reason="mounting a small disk needs root"
)
WORDS = (
    "-t", "phone", "--set", "teacher.train.tokens=3000", "--set", "distill.teacher_signals=live", "--set",
    "distill.checkpoint_every_s=0.1", "--set", "distill.tokens=100000",
)  # fmt: skip


def mounted(place: Path, size: str):
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"cannot mount a small disk: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.fixture
def small_disk(tmp_path):
    """4 MB: several checkpoints of the tests' model."""
    yield from mounted(tmp_path / "small", "4m")


@pytest.fixture
def store_disk(tmp_path):
    """Enough for what the plan asks for."""
    yield from mounted(tmp_path / "disk", "400m")


def fill(place: Path) -> Path:
    """A file that leaves no room on the disk of `place`."""
    ballast = place / "ballast"
    free = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
    with ballast.open("wb") as file:
        if free:
            os.posix_fallocate(file.fileno(), 0, free)
    return ballast


@pytest.mark.parametrize("step", [1, 5])
def test_a_checkpoint_that_does_not_fit_keeps_the_one_before(small_disk, tmp_path, monkeypatch, step):
    straight = model()
    run(straight, tmp_path / "straight", checkpoint_every_s=1e-9)
    state = small_disk / "state"

    def fill_before(*arguments, **named):
        if named["position"].step == step:
            fill(small_disk)
        save_checkpoint(*arguments, **named)

    monkeypatch.setattr("edgedistill.training.trainer.save_checkpoint", fill_before)
    with pytest.raises(UserError, match=r"the disk is full: a checkpoint could not be written[\s\S]*before it is kept"):
        run(model(), state, checkpoint_every_s=1e-9)
    assert [path.name for path in state.glob("step-*")] == ([f"step-{step - 1:09d}"] if step > 1 else [])
    monkeypatch.undo()
    (small_disk / "ballast").unlink()
    resumed = model()
    run(resumed, state, checkpoint_every_s=1e-9)
    assert same(straight, resumed)


def test_a_disk_that_fills_up_while_the_command_trains(store_disk, tmp_path):
    """The store's disk is full from some checkpoint on; with room again the command ends with the same bytes."""
    command = Command(tmp_path, {"EDGEDISTILL_STORE": str(store_disk / "store"), "OMP_NUM_THREADS": "1"})
    process = command.start("distill", command.recipe(), *WORDS)
    deadline = time.monotonic() + 200
    while not list((store_disk / "store" / "work").glob("student-*/state/checkpoints/step-*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    ballast = fill(store_disk)
    out, err = process.communicate(timeout=200)
    refused(subprocess.CompletedProcess(process.args, process.returncode, out, err), "the disk is full")
    (kept,) = (store_disk / "store" / "work").glob("student-*/state/checkpoints/step-*")
    ballast.unlink()
    again = command("distill", command.recipe(), *WORDS, "--json")
    assert again.returncode == 0, again.stderr
    step = int(kept.name.removeprefix("step-"))
    assert f"distill: goes on from step {step:,} of" in again.stderr
    elsewhere = Command(tmp_path, {"EDGEDISTILL_STORE": str(tmp_path / "roomy"), "OMP_NUM_THREADS": "1"})
    straight = elsewhere.json("distill", command.recipe(), *WORDS)
    assert json.loads(again.stdout)["student"]["weights_sha256"] == straight["student"]["weights_sha256"]


def test_signals_that_do_not_fit_keep_their_whole_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "SHARD_BYTES", 10_000)
    build(tmp_path / "straight", "hidden")
    whole = sorted((tmp_path / "straight").iterdir())
    size = sum(path.stat().st_size for path in whole)
    disks = mounted(tmp_path / "small", str(2 * size))
    small = next(disks)
    from test_signal_cache import produce

    plain, calls = produce(), []

    def filling(rows):
        calls.append(1)
        if len(calls) == 6:
            fill(small)
        return plain(rows)

    with pytest.raises(UserError, match="shards that were written are kept"):
        build(small / "cache", "hidden", produce=filling)
    kept = sorted(path.name for path in (small / "cache").glob("*.safetensors"))
    assert 0 < len(kept) < len(whole) - 1
    assert not list((small / "cache").glob("*.tmp"))
    (small / "ballast").unlink()
    stamps = {name: (small / "cache" / name).stat().st_mtime_ns for name in kept}
    build(small / "cache", "hidden")
    assert {name: (small / "cache" / name).stat().st_mtime_ns for name in kept} == stamps
    for path in whole:
        assert (small / "cache" / path.name).read_bytes() == path.read_bytes(), path.name
    assert packed().sequences > len(kept)
    for _ in disks:
        pass
