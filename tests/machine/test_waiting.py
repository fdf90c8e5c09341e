"""How long waiting threads spin: what libgomp says it was given where training, verifying and measuring load it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command import Command
from test_bench import artifact_of
from tiny_models import tiny_checkpoint, tiny_genai, tiny_gguf

from edgedistill.bench.measure import bench
from edgedistill.config.recipe import Bench
from edgedistill.config.targets import load_target
from edgedistill.machine import waiting
from edgedistill.progress import Progress
from edgedistill.runtimes.process import RuntimeName, RuntimeProcess
from edgedistill.store import Store

NAMES = (*waiting.USERS, waiting.MARK)
SHOW = {"OMP_DISPLAY_ENV": "VERBOSE"}  # libgomp prints what it read when it is loaded
SPINS = waiting.OURS["GOMP_SPINCOUNT"]
BUSY_SPINS = waiting.BESIDE_OTHERS["GOMP_SPINCOUNT"]


def without_a_word(**said: str) -> dict[str, str]:
    """This process's environment as that of a user who said nothing, or just this, about how threads wait."""
    return {name: value for name, value in os.environ.items() if name not in NAMES} | said


@pytest.fixture
def silent_user(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def gguf_folder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf(checkpoint, tmp_path_factory.mktemp("gguf") / "model.gguf").parent


@pytest.fixture(scope="module")
def onnx_folder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_genai(checkpoint, tmp_path_factory.mktemp("onnx") / "fp32", precision="fp32")


def environment_of(pid: int) -> dict[str, str]:
    """What a process was started with."""
    pairs = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def children_here() -> list[int]:
    """The runtimes' processes that this one started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            worker = b"edgedistill.runtimes.worker" in path.with_name("cmdline").read_bytes()
        except OSError:  # it has ended
            continue
        if parent == os.getpid() and worker:
            found.append(int(path.parent.name))
    return found


def test_what_the_user_says_is_left_alone() -> None:
    assert waiting.asleep({"A": "b"}) == {"A": "b", waiting.MARK: "set", **waiting.OURS}
    for name in waiting.USERS:
        said = {name: "1"}
        once = waiting.asleep(said)
        assert once == said | {waiting.MARK: "user"}
        assert waiting.asleep(once) == once
        assert waiting.spinning(once) == said
    assert waiting.spinning(waiting.asleep({"A": "b"})) == {"A": "b"}
    assert waiting.spinning(waiting.asleep({"A": "b"}) | waiting.BESIDE_OTHERS) == {"A": "b"}
    # set again by somebody after us: that is no longer ours
    assert waiting.spinning(waiting.asleep({}) | {"GOMP_SPINCOUNT": "7"}) == {"GOMP_SPINCOUNT": "7"}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says how many threads run")
def test_other_work_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        assert waiting.others_run()
    finally:
        for each in others:
            each.kill()
            each.wait()
    loadavg = tmp_path / "loadavg"
    monkeypatch.setattr(waiting, "LOADAVG", loadavg)
    for text, seen in (
        ("0.38 1.57 2.23 1/81 6950", False),
        ("0.00 0.00 0.00 2/81 6950", True),
        ("", False),
        ("x", False),
    ):
        loadavg.write_text(text)
        assert waiting.others_run() is seen, text
    loadavg.unlink()
    assert not waiting.others_run()


@pytest.mark.skipif(sys.platform != "linux", reason="torch bundles GNU's OpenMP on Linux")
def test_the_training_process_has_it(tmp_path: Path) -> None:
    """`distill` by the command line, and a user's own values: what OpenMP says it read where torch loaded it."""
    run = Command(tmp_path)

    def shown(**said: str) -> str:
        command = [*run.arguments("distill", run.recipe(), "--target", "jetson")]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=300,
            env={name: value for name, value in run.env().items() if name not in NAMES} | SHOW | said,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stderr

    found = set(re.findall(r"GOMP_SPINCOUNT = '(\w+)'", shown()))
    assert len(found) == 1 and found <= {SPINS, BUSY_SPINS}, "by what else runs at the time"
    # the second run finds the student in the store and loads torch all the same
    own = shown(OMP_WAIT_POLICY="ACTIVE", GOMP_SPINCOUNT="777")
    assert set(re.findall(r"GOMP_SPINCOUNT = '(\w+)'", own)) == {"777"}
    assert set(re.findall(r"OMP_WAIT_POLICY = '(\w+)'", own)) == {"ACTIVE"}


def test_python_users_get_it_with_the_first_call_of_the_pipeline(tmp_path: Path) -> None:
    script = (
        "import os, sys\n"
        "from edgedistill import pipeline\nfrom edgedistill.machine import waiting\n"
        "assert waiting.MARK not in os.environ and 'torch' not in sys.modules, 'importing changes nothing'\n"
        "from edgedistill.config.recipe import load_recipe\n"
        "from edgedistill.store import Store\n"
        "from edgedistill.config.targets import load_target\n"
        "recipe = load_recipe('own', ['teacher.model=/nowhere', 'data.source=/nowhere'])\n"
        "from edgedistill.errors import UserError\n"
        "try:\n    pipeline.distill(recipe, [load_target('jetson')], store=Store())\n"
        "except UserError:\n    print(os.environ['GOMP_SPINCOUNT'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60,
        env=without_a_word(EDGEDISTILL_STORE=str(tmp_path)),
    )  # fmt: skip
    assert done.stdout.strip() in (SPINS, BUSY_SPINS), done.stderr


@pytest.mark.parametrize("runtime", ["llama.cpp", "onnxruntime", "onnxruntime-genai"])
def test_the_runtimes_sleep_except_where_speed_is_measured(
    runtime: RuntimeName, gguf_folder: Path, onnx_folder: Path, silent_user: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    artifact = gguf_folder / "model.gguf" if runtime == "llama.cpp" else onnx_folder
    silent_user.setenv("OMP_DISPLAY_ENV", "VERBOSE")
    log = tmp_path / "log"

    def opened(spin: bool) -> tuple[dict[str, str], dict[str, object], str]:
        log.unlink(missing_ok=True)
        with RuntimeProcess(runtime, artifact, threads=2, context_tokens=64, spin=spin, log=log) as process:
            process.greedy([1, 2, 3], 2)
            return environment_of(process.info["pid"]), process.info["options"], log.read_text(errors="replace")

    environment, options, said = opened(False)
    assert environment["GOMP_SPINCOUNT"] == SPINS
    assert options.get("spins", False) is False
    if runtime == "llama.cpp":
        assert f"GOMP_SPINCOUNT = '{SPINS}'" in said
    waiting.let_threads_sleep()  # as the command line did for this process
    environment, options, said = opened(True)
    assert not set(NAMES) & set(environment)
    assert options.get("spins", True) is True
    if runtime == "llama.cpp":
        assert "GOMP_SPINCOUNT = '300000'" in said
    silent_user.setenv("GOMP_SPINCOUNT", "777")
    assert opened(True)[0]["GOMP_SPINCOUNT"] == "777"


def test_bench_measures_what_an_app_would_get(
    gguf_folder: Path, silent_user: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in waiting.asleep({}).items():
        silent_user.setenv(name, value)
    seen: list[dict[str, str]] = []

    class Watch(Progress):
        def step(self, *_: object, **__: object) -> None:
            seen.extend(environment_of(pid) for pid in children_here())

    artifact = artifact_of(gguf_folder, format_="gguf", runtime="llama.cpp", entry="model.gguf")
    bench(
        artifact, gguf_folder, load_target("jetson"), store=Store(tmp_path), progress=Watch(),
        settings=Bench(prompt_tokens=8, new_tokens=2, warmup=0, repeats=2, threads=1),
    )  # fmt: skip
    assert seen and all(not set(NAMES) & set(environment) for environment in seen)
