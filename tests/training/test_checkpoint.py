"""Checkpoints: whole or not there, whatever the moment at which the process dies."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import torch
from safetensors.torch import load_file
from training_models import model, run, same

KILLS = 20

# One process that has everything imported and forks for each attempt; the parent kills the child while a checkpoint
# is being written (its folder is there), at a random moment of it.
SCRIPT = """
import os, random, signal, sys, time
from pathlib import Path
sys.path[:0] = {path!r}
import torch
torch.set_num_threads(1)
from safetensors.torch import save_file
from training_models import model, run

state, out, kills = Path({state!r}), {out!r}, {kills}
random.seed(0)

def train():
    student = model(dropout=0.1)
    run(student, state, checkpoint_every_s=1e-9, tokens=16 * 4 * 300, evaluate_every_share=0.05)
    save_file({{k: v.detach().contiguous() for k, v in student.named_parameters()}}, out)

done, torn = 0, 0
while True:
    child = os.fork()
    if child == 0:
        try:
            train()
        except BaseException as error:
            print("failed:", error, flush=True)
            os._exit(1)
        os._exit(0)
    wait_for = random.randint(3, 12)  # writes to let pass, so that every attempt gets somewhere
    seen, inside = 0, False
    status = None
    while status is None:
        ended, code = os.waitpid(child, os.WNOHANG)
        if ended:
            status = code
            break
        now = (state / "writing").exists() or (state / "writing-best").exists()
        seen += now and not inside
        inside = now
        if done < kills and inside and seen >= wait_for:
            time.sleep(random.uniform(0, 0.003))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            done += 1
            torn += (state / "writing").exists() or (state / "writing-best").exists()
            break
    if status is not None:
        print("ended", os.waitstatus_to_exitcode(status), "kills", done, "torn", torn, flush=True)
        sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_sigkill_during_twenty_checkpoint_writes_changes_nothing(tmp_path, repository):
    here = str(Path(__file__).resolve().parents[1] / "helpers")

    def script(name: str, kills: int) -> str:
        text = SCRIPT.format(
            path=[here, str(repository)], state=str(tmp_path / name), out=str(tmp_path / f"{name}.st"), kills=kills
        )
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(text)], capture_output=True, text=True, timeout=400, check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    script("straight", 0)
    words = script("killed", KILLS).split()
    assert int(words[words.index("kills") + 1]) == KILLS
    assert int(words[words.index("torn") + 1]) >= KILLS // 4, (
        "hardly any kill fell into a write: the test tests nothing"
    )
    first, second = load_file(tmp_path / "straight.st"), load_file(tmp_path / "killed.st")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_torn_newest_checkpoint_cannot_exist_and_leftovers_do_no_harm(tmp_path):
    straight = model()
    run(straight, tmp_path / "a", tokens=16 * 4 * 6)
    (tmp_path / "b" / "writing").mkdir(parents=True)
    (tmp_path / "b" / "writing" / "model.safetensors").write_bytes(random.Random(0).randbytes(100))
    (tmp_path / "b" / "writing-best").mkdir()
    student = model()
    run(student, tmp_path / "b", tokens=16 * 4 * 6, checkpoint_every_s=1e-9)
    assert same(straight, student)


def test_the_best_and_the_last_are_kept_and_nothing_else(tmp_path):
    result = run(
        model(), tmp_path, tokens=16 * 4 * 40, checkpoint_every_s=1e-9, learning_rate=0.3, muon_learning_rate=0.3
    )
    names = {path.name for path in tmp_path.iterdir()}
    assert f"best-{result.best_step:09d}" in names
    assert len([name for name in names if name.startswith("step-")]) == 1
    assert len([name for name in names if name.startswith("best-")]) <= 2
