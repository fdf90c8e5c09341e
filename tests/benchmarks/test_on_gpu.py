"""benchmarks/on_gpu.sh at tiny sizes, in an environment that holds what a bare GPU machine and the wheels hold."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from command import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

SCRIPT = ROOT / "benchmarks" / "on_gpu.sh"
MACHINE_HAS = ("torch", "transformers", "accelerate", "onnx", "onnxruntime")


def with_requirements(names: tuple[str, ...]) -> set[str]:
    """The distributions and all that they require, as far as they are installed."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        try:
            asked = distribution(name).requires or []
        except PackageNotFoundError:
            continue
        found.add(name)
        rows = [Requirement(row) for row in asked]
        waiting += [row.name for row in rows if row.marker is None or row.marker.evaluate({"extra": ""})]
    return found


def wheels() -> list[str]:
    listed = re.search(r"^wheels=\(([^)]*)\)", SCRIPT.read_text(), re.MULTILINE)
    assert listed
    return listed[1].split()


def bare_environment(folder: Path) -> Path:
    """An environment with those distributions and no others, by links; its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    for name in with_requirements(MACHINE_HAS) | {canonicalize_name(name) for name in wheels()}:
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue  # trl, liger-kernel: peers, whose comparisons are left out where they are not installed
        tops = {Path(str(file)).parts[0] for file in found.files or []} - {"..", "__pycache__"}
        for top in tops:
            link, target = site / top, Path(str(found.locate_file(top)))
            if not link.exists():
                link.symlink_to(target.resolve())
    return python


def test_every_step_runs_on_a_bare_machine(tmp_path: Path) -> None:
    """On the CPU at tiny sizes, so that the command does not rot while no GPU is at hand."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {
        "PYTHON": str(bare_environment(tmp_path / "bare")),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    missing = subprocess.run(
        [environment["PYTHON"], "-c", "import llama_cpp"], env=environment, capture_output=True, text=True, check=False
    )
    assert "No module named 'llama_cpp'" in missing.stderr
    out = tmp_path / "out"
    done = subprocess.run(
        ["bash", str(SCRIPT), "--tiny", "--check", "--out", str(out)], env=environment, cwd=tmp_path,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    logs = "".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in sorted(out.glob("*.log")))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    rows = {row["step"]: row for row in map(json.loads, (out / "results.jsonl").read_text().splitlines())}
    assert all(row["code"] == 0 and row["tiny"] for row in rows.values())
    assert rows["machine"]["result"]["torch"] and "gpu" not in rows["machine"]["result"]
    assert rows["head_loss"]["result"]["figures"]["cases"]
    assert rows["trainer"]["result"]["figures"]["results"]["ours"]["tokens_per_s"] > 0
    assert rows["quickstart_training"]["result"]["student"]
    assert rows["memory"]["result"]["figures"]["live bf16 teacher, FSDP2"]["measured_bytes"] > 0
    assert " passed" in rows["tests"]["result"][-1]


def test_a_step_out_of_time_is_told_and_the_next_one_runs(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from on_gpu import Step, run
    finally:
        sys.path.pop(0)
    here = {**os.environ, "TMPDIR": str(tmp_path)}
    slow = Step(1, [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"])
    row = run("slow", slow, tmp_path, here, 1.0)
    assert row["code"] is None and row["ended"] == "out of time: 1 s" and row["seconds"] < 30
    assert (tmp_path / "slow.out").read_text() == "begun\n"
    row = run("failing", Step(20, [sys.executable, "-c", "raise SystemExit('no')"]), tmp_path, here, 100.0)
    assert row["code"] == 1 and "result" not in row and (tmp_path / "failing.log").read_text() == "no\n"


def test_without_a_gpu_nothing_is_measured(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(SCRIPT), "--out", str(tmp_path / "out")], env={**os.environ, "PYTHON": sys.executable,
        "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "nothing was measured" in done.stderr and not (tmp_path / "out").exists()
