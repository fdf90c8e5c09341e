"""torchrun and `accelerate launch`: one result, said once; ranks that refuse or die end the run and lose nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Command, refused
from safetensors.torch import load_file

TORCHRUN = (
    "torch.distributed.run",
    "--nproc-per-node",
    "2",
    "--rdzv-backend",
    "c10d",
    "--rdzv-endpoint",
    "localhost:0",
)
ACCELERATE = ("accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0")
LAUNCHERS = {
    "torchrun": TORCHRUN,
    "accelerate-fsdp": (*ACCELERATE, "--use_fsdp", "--fsdp_version", "2"),
    "deepspeed": (*ACCELERATE, "--use_deepspeed", "--zero_stage", "3"),
}
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: pip install deepspeed"
)
WORDS = (
    "-t", "phone", "--set", "teacher.train.tokens=3000", "--set", "distill.teacher_signals=live", "--set",
    "distill.precision=fp32", "--set", "distill.evaluate_every_share=0.2",
)  # fmt: skip
SHORT = (*WORDS, "--set", "distill.tokens=6000")
LONG = (*WORDS, "--set", "distill.tokens=60000", "--set", "distill.checkpoint_every_s=0.2")
END_S = 60  # a run whose rank died has ended by then; it takes a second or two on an idle machine


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Command:
    """One process's store, with the teacher that all runs share, and its student."""
    command = Command(tmp_path_factory.mktemp("alone"), {"OMP_NUM_THREADS": "1"}, warm=True)
    (command.folder / "short.json").write_text(json.dumps(command.json("distill", command.recipe(), *SHORT)))
    return command


@pytest.fixture
def fresh(alone, tmp_path) -> Command:
    """A store that has the teacher and the data, and no student."""
    command = Command(tmp_path, alone.environment)
    shutil.copytree(alone.folder / "store", tmp_path / "store")
    shutil.rmtree(tmp_path / "store" / "records" / "student")
    return command


def launched(command: Command, launcher: tuple[str, ...], *words: str) -> subprocess.Popen[str]:
    place = [sys.executable, "-m", *launcher, "-m", "edgedistill", *words]
    return subprocess.Popen(
        place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=command.folder, env=command.env(),
        start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str], timeout: float = 200) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        # a run that hangs is a failure, and no process of it may stay
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    return process.returncode, out, err


def close(ours: dict[str, Any], reference: dict[str, Any]) -> None:
    """The same student up to rounding."""
    first, second = (document["training"]["history"] for document in (ours, reference))
    assert [row["step"] for row in first] == [row["step"] for row in second]
    for row, expected in zip(first, second, strict=True):
        # a KL of 1e-4 nats is a small difference of large numbers: rounding shows in its fourth digit
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4, abs=1e-6)
        assert row["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-5)
    one, other = (load_file(Path(document["path"]) / "model.safetensors") for document in (ours, reference))
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "launcher",
    [
        "torchrun",
        "accelerate-fsdp",
        pytest.param("deepspeed", marks=needs_deepspeed),
    ],
)
def test_two_ranks_leave_the_student_of_one_and_say_everything_once(alone, fresh, launcher):
    code, out, err = finish(launched(fresh, LAUNCHERS[launcher], "distill", alone.recipe(), *SHORT, "--json"))
    assert code == 0, err
    document = json.loads(out)
    assert document["student"]["training"]["ranks"] == 2
    reference = json.loads((alone.folder / "short.json").read_text())
    assert reference["student"]["training"]["ranks"] == 1
    close(document["student"], reference["student"])
    assert len(list((fresh.folder / "store" / "records" / "student").iterdir())) == 1
    assert not list((fresh.folder / "store" / "work").iterdir())
    said = [line.partition("] ")[2] for line in err.splitlines() if line.startswith("[")]
    assert "2 ranks" in err
    assert sum(text.startswith("plan: student of") for text in said) == 1
    for text in document["plan"]["warnings"]:
        assert said.count(f"warning: {text}") == 1
    # one process finds what they left
    assert fresh.json("distill", alone.recipe(), *SHORT)["student"]["reused"] is True


def test_accelerate_on_the_cpu_alone_starts_one_process_and_that_is_refused(alone, fresh):
    code, out, err = finish(launched(fresh, (*ACCELERATE, "--cpu"), "distill", alone.recipe(), *SHORT, "--json"))
    assert code != 0
    assert not out
    assert "accelerate launch --cpu" in err
    assert "torchrun --nproc-per-node" in err


def test_what_every_rank_refuses_ends_at_once_with_the_ranks_named(alone, fresh):
    words = ("distill", alone.recipe(), *SHORT, "--set", "distill.batch_sequences=7", "--json")
    code, out, err = finish(launched(fresh, TORCHRUN, *words), timeout=100)
    assert code == 1  # torchrun's own, whatever its children's
    assert not out
    ours = err.partition("torch/distributed/elastic")[0]
    assert "Traceback" not in ours
    for rank in (0, 1):
        assert ours.count(f"error (rank {rank}): distill.batch_sequences is 7, which 2 ranks cannot share evenly") == 1
    assert "exitcode  : 2" in err


def rank_process(launcher: int, rank: int) -> int:
    """The process of a rank, found by what torchrun put into its environment."""
    for entry in Path("/proc").iterdir():
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1]) if entry.name.isdigit() else 0
            if parent == launcher and f"RANK={rank}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                return int(entry.name)
        except OSError:
            continue
    raise AssertionError(f"no rank {rank}")


def newest_step(command: Command) -> int:
    steps = (command.folder / "store" / "work").glob("student-*/state/checkpoints/step-*")
    return max((int(path.name.removeprefix("step-")) for path in steps), default=0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the ranks in /proc")
def test_a_rank_that_is_killed_ends_the_run_and_the_next_goes_on(alone, fresh):
    """First rank 1, then rank 0; what one process then leaves is the student of a run that nothing disturbed."""
    reached = 0
    for victim in (1, 0):
        process = launched(fresh, TORCHRUN, "distill", alone.recipe(), *LONG)
        deadline = time.monotonic() + 100
        while newest_step(fresh) <= reached:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(rank_process(process.pid, victim), signal.SIGKILL)
        killed = time.monotonic()
        code, _, err = finish(process, timeout=END_S)
        assert code == 1
        assert time.monotonic() - killed < END_S
        assert "SIGKILL" in err  # torchrun names the rank and the signal
        ours = err.partition("torch/distributed/elastic")[0]
        assert "Traceback" not in ours
        # the other rank says so too, unless torchrun ended it first
        if "error" in ours:
            assert f"error (rank {1 - victim}): rank {1 - victim} of 2 lost another rank" in ours
            assert "the last checkpoint is kept" in ours
        if reached:
            assert "goes on from step" in err
        reached = newest_step(fresh)
    last = fresh("distill", alone.recipe(), *LONG, "--json")
    assert last.returncode == 0, last.stderr
    assert f"goes on from step {reached:,} of" in last.stderr
    close(json.loads(last.stdout)["student"], alone.json("distill", alone.recipe(), *LONG)["student"])


def test_two_ranks_write_the_teachers_cache_of_one(alone, fresh):
    words = (
        "teacher", "cache", alone.recipe(), "--set", "teacher.train.tokens=3000", "--set", "distill.precision=fp32",
        "--set", "distill.context_tokens=64", "--json",
    )  # fmt: skip
    code, out, err = finish(launched(fresh, TORCHRUN, *words))
    assert code == 0, err
    made = json.loads(out)
    one = alone.json(*words[:-1])
    assert Path(made["path"]).parts[-3:] == Path(one["path"]).parts[-3:]  # the same key
    names = sorted(path.name for path in Path(one["path"]).iterdir())
    assert names == sorted(path.name for path in Path(made["path"]).iterdir())
    for name in names:
        assert (Path(made["path"]) / name).read_bytes() == (Path(one["path"]) / name).read_bytes(), name


def test_a_launch_by_mpi_is_refused(alone, fresh):
    command = Command(fresh.folder, {**fresh.environment, "PMI_SIZE": "2", "PMI_RANK": "0"})
    refused(command("distill", alone.recipe(), *SHORT), "2 processes were started by MPI", "torchrun")
