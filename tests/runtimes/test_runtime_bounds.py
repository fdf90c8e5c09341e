"""What the process of an artifact that is not trusted may not do: each thing is tried within the bounds."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from edgedistill.runtimes import seccomp
from edgedistill.runtimes.bounds import OWN, limits_of, replay_of
from edgedistill.runtimes.confine import layers_off
from edgedistill.runtimes.staging import LOCK, PREFIX, PrivateFolder

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the layers are Linux's")
SCRIPT = Path(__file__).resolve().parents[1] / "helpers" / "bounds_script.py"
NOBODY = 65534
MIB = 1 << 20


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return filled(tmp_path)


def filled(place: Path) -> Path:
    (place / "private").mkdir()
    for name in ("there", "artifact", "private/mine"):
        (place / name).write_text(name)
    return place


def tried(attempt: str, place: Path, layers: str | None = None, **options: object) -> str:
    words = [sys.executable, "-P", str(SCRIPT), attempt, str(place), *([layers] if layers else [])]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, **options)  # type: ignore[call-overload]
    if done.returncode < 0:
        return f"died: {signal.Signals(-done.returncode).name}"
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def report(place: Path, **options: object) -> dict[str, str]:
    words = [sys.executable, "-P", str(SCRIPT), "nothing", str(place)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True, **options)  # type: ignore[call-overload]
    found: dict[str, str] = eval(done.stdout.splitlines()[0])
    return found


STOPPED = (
    "inet", "inet6", "unix", "uring", "fork", "exec", "write", "write-private", "overwrite", "read", "unlink", "rename",
    "allocate", "allocate-by-and-by", "threads", "kill", "raise-limits", "memory-file", "thread-write", "thread-fork",
    "thread-unix",
)  # fmt: skip


@pytest.mark.parametrize("attempt", STOPPED)
def test_it_is_stopped(attempt: str, place: Path) -> None:
    before = sorted(place.rglob("*"))
    assert tried(attempt, place).startswith("stopped:")
    assert sorted(place.rglob("*")) == before and (place / "there").read_text() == "there"


def test_what_a_replay_needs_is_left(place: Path) -> None:
    assert tried("read-private", place) == "done: private/mine"
    assert tried("read-artifact", place) == "done: artifact"
    assert tried("nothing", place) == "done: nothing"
    assert tried("abort", place) == "died: SIGABRT"  # how a library says that it is lost


def test_processor_time_ends(place: Path) -> None:
    assert tried("spin", place) == "died: SIGXCPU"


@pytest.mark.parametrize(
    ("layer", "attempts"),
    [
        ("system_calls", "inet unix fork exec write overwrite unlink rename kill memory-file thread-write"),
        ("landlock", "write overwrite read unlink rename"),
        ("network", "inet"),
        ("none", "allocate allocate-by-and-by threads raise-limits"),
    ],
)
def test_a_layer_holds_alone(layer: str, attempts: str, place: Path) -> None:
    for attempt in attempts.split():
        assert tried(attempt, place, layer).startswith("stopped:"), attempt


def test_without_a_layer_the_attempts_succeed(place: Path) -> None:
    """They are stopped by the layers, and not by what they ask for."""
    for attempt in ("unix", "exec", "write", "read", "unlink"):
        assert tried(attempt, place, "none").startswith("done:"), attempt


def test_every_layer_is_there_or_said(place: Path) -> None:
    found = report(place)
    assert {"limits", "no_new_privs", "network", "landlock", "system_calls"} <= set(found)
    assert all(what == "on" or what.startswith(("off: ", "Landlock ")) for what in found.values())
    assert layers_off({"landlock": "off: not in this kernel", "limits": "on"}) == ["landlock off: not in this kernel"]


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")
def test_another_user_is_bound_as_well() -> None:
    with tempfile.TemporaryDirectory() as name:  # which others reach, as they do not pytest's
        place = filled(Path(name))
        for path in (place, *place.rglob("*")):
            shutil.chown(path, NOBODY, NOBODY)
        _bound_as_another(place)


def _bound_as_another(place: Path) -> None:
    for attempt in ("inet", "unix", "fork", "exec", "write", "overwrite", "unlink", "allocate"):
        found = tried(attempt, place, "landlock,system_calls,network,nobody")
        assert found.startswith("stopped:"), (attempt, found)
    assert tried("write", place, "nobody") == "done: wrote written"


def test_the_log_is_bounded(place: Path) -> None:
    log = place / "log"
    with log.open("wb") as file:
        subprocess.run([sys.executable, "-P", str(SCRIPT), "flood", str(place)], stdout=file, timeout=60, check=False)
    assert 0 < log.stat().st_size <= 8 * MIB


def test_the_filter_is_written_for_both_architectures() -> None:
    for machine in seccomp.SYS_SECCOMP:
        code = seccomp.program(machine, 1234, writes=False)
        rows = [code[i : i + 8] for i in range(0, len(code), 8)]
        assert len(code) % 8 == 0 and len(rows) < 4096
        for at, row in enumerate(rows):
            if row[0] & 7 == 5:  # a jump stays within the program
                assert at + 1 + max(row[2], row[3]) < len(rows)
        assert len(seccomp.program(machine, 1234, writes=True)) < len(code)
    assert platform.machine()


def test_limits_follow_the_artifact() -> None:
    small = limits_of(replay_of(1000), artifact_bytes=MIB, context_tokens=144, threads=1)
    large = limits_of(replay_of(1000), artifact_bytes=8 << 30, context_tokens=144, threads=4)
    assert small.memory_bytes is not None and small.memory_bytes < 1 << 30
    assert small.cpu_s is not None and small.cpu_s < 10
    assert large.cpu_s is not None and large.cpu_s > 1000
    assert large.memory_bytes is not None and large.memory_bytes > small.memory_bytes
    own = limits_of(OWN, artifact_bytes=MIB, context_tokens=144, threads=1)
    assert (own.address_bytes, own.cpu_s, own.wall_s) == (None, None, None)


class TestPrivateFolder:
    def test_it_is_the_owners_alone_and_goes(self) -> None:
        folder = PrivateFolder()
        assert folder.root.stat().st_mode & 0o777 == 0o700
        (folder.content / "x").write_text("x")
        folder.close()
        folder.close()
        assert not folder.root.exists()

    def test_what_a_killed_program_left_is_removed_by_the_next(self) -> None:
        code = (
            "import os, sys; sys.path.append(sys.argv[1])\n"
            "from edgedistill.runtimes.staging import PrivateFolder\n"
            "print(PrivateFolder().root, flush=True); os.kill(os.getpid(), 9)"
        )
        root = str(Path(__file__).resolve().parents[2])
        done = subprocess.run([sys.executable, "-P", "-c", code, root], capture_output=True, text=True)
        left = Path(done.stdout.strip())
        assert done.returncode == -9 and left.name.startswith(PREFIX) and (left / LOCK).exists()
        mine = PrivateFolder()
        other = PrivateFolder()
        assert not left.exists() and mine.root.exists(), "only what nobody holds"
        mine.close()
        other.close()
