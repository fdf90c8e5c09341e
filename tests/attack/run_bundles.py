"""Runs the command on changed bundles, each in a process forked from one that has imported what it needs.

Of each: exit code, seconds, memory above start, what it printed, and whether it wrote or ran anything.
"""

from __future__ import annotations

import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "helpers"), str(TESTS.parent)]

from attack.bundles import Changed, change, harmless  # noqa: E402

MAX_S = 10.0
MAX_BYTES = 200 << 20
KILL_S = 60
RAN = Path("/tmp/attacked-ran")
ESCAPES = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u200e\u200f]")


@dataclass(frozen=True)
class Outcome:
    """`fault`: what should not have been; "" where the change was refused in bounds, or is harmless."""

    number: int
    what: str
    code: int
    seconds: float
    grown_bytes: int
    said: str
    fault: str
    harmless: bool


def warm() -> None:
    """Import what the command will, so that forked processes have it, and share it: a collection would copy it."""
    import gc

    import jinja2  # noqa: F401
    import matplotlib.backends.backend_svg
    import matplotlib.figure  # noqa: F401

    import edgedistill.bench.measure
    import edgedistill.bundle.check
    import edgedistill.bundle.report
    import edgedistill.cli.app
    import edgedistill.cli.show  # noqa: F401

    gc.freeze()


def attack(
    good: Path, scratch: Path, seed: int, number: int, *, command: str = "verify", replay: bool = True
) -> Outcome:
    """Copy the good bundle into `scratch`, change it, run the command on it."""
    place = scratch / f"case-{os.getpid()}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    bundle = place / good.name
    shutil.copytree(good, bundle)
    changed = change(bundle, seed, number, replay=replay)
    before = snapshot(place)
    code, seconds, grown, said = run(_words(command, bundle, place), place)
    after = snapshot(place)
    fault = _fault(changed, code, seconds, grown, said)
    if not fault and after != before | ({place / "said": after.get(place / "said")} if place / "said" in after else {}):
        fault = f"it wrote {sorted(str(path) for path in set(after) ^ set(before))[:3]}"
    if RAN.exists():
        RAN.unlink()
        fault = "it ran what the bundle says"
    shutil.rmtree(place, ignore_errors=True)
    return Outcome(number, changed.what, code, seconds, grown, said, fault, harmless(changed))


def _words(command: str, bundle: Path, place: Path) -> list[str]:
    if command == "report":
        return ["report", str(bundle), "--out", str(place.parent / f"page-{os.getpid()}.html")]
    return ["bundle", "verify", str(bundle)]


def _fault(changed: Changed, code: int, seconds: float, grown: int, said: str) -> str:
    # Beside other work a second is shorter than one of a clock.
    if seconds > MAX_S * min(6.0, max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))):
        return f"it took {seconds:.1f} s"
    if grown > MAX_BYTES:
        return f"it took {grown / 1e6:,.0f} MB"
    if "Traceback" in said:
        return "a traceback"
    if ESCAPES.search(said):
        return f"it printed {ESCAPES.findall(said)[:3]!r}"
    if code == 0:
        return "" if harmless(changed) else "accepted"
    return "" if code in (1, 2) and "error: " in said and "try: " in said else f"exit code {code}"


def snapshot(folder: Path) -> dict[Path, tuple[int, ...] | None]:
    """Every name below a folder with what a change of it would move; links are not followed."""
    found: dict[Path, tuple[int, ...] | None] = {}
    waiting = [folder]
    while waiting and len(found) < 5000:
        here = waiting.pop()
        try:
            entries = list(os.scandir(here))
        except OSError:
            continue
        for entry in entries:
            status = entry.stat(follow_symlinks=False)
            found[Path(entry.path)] = (status.st_mode, status.st_size, status.st_mtime_ns, status.st_ino)
            if entry.is_dir(follow_symlinks=False) and len(entry.path) < 3000:
                waiting.append(Path(entry.path))
    return found


def run(words: list[str], place: Path) -> tuple[int, float, int, str]:
    """Exit code (negative: a signal), seconds, memory above the start, and all that was printed."""
    said = place.parent / f"said-{os.getpid()}"
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _child(words, said)
    deadline = started + KILL_S
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            _, status, usage = os.wait4(pid, 0)
            break
        time.sleep(0.002)
    seconds = time.monotonic() - started
    text = said.read_text(encoding="utf-8", errors="backslashreplace")
    said.unlink()
    text, _, resident = text.rpartition("\nresident at start: ")
    grown = usage.ru_maxrss * 1024 - int(resident or 0) if resident.strip().isdigit() else 0
    return os.waitstatus_to_exitcode(status), seconds, grown, text


def _child(words: list[str], said: Path) -> None:
    code = 70
    try:
        descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        from edgedistill.cli.app import run as command

        try:
            command(words)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(1, f"\nresident at start: {resident}".encode())
    finally:
        os._exit(code)


def outcomes(
    good: Path,
    scratch: Path,
    cases: range,
    *,
    seed: int = 0,
    command: str = "verify",
    replay: bool = True,
    workers: int = 1,
) -> Iterator[Outcome]:
    """The cases, shared among so many processes that each fork a process a case."""
    environment = {**os.environ, "EDGEDISTILL_STORE": str(scratch / "store"), "EDGEDISTILL_LLAMA_EXTRA_BUFTS": "0"}
    words = [str(seed), str(cases.start), str(cases.stop), command, "replay" if replay else "whole"]
    started = [
        subprocess.Popen(
            [sys.executable, "-P", __file__, str(good), str(scratch), *words, str(worker), str(workers)],
            stdout=subprocess.PIPE, text=True, env=environment,
        )
        for worker in range(workers)
    ]  # fmt: skip
    # All at once: a worker whose pipe is full waits.
    found: queue.Queue[str | None] = queue.Queue()

    def read(process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                found.put(line)
        found.put(None)

    for process in started:
        threading.Thread(target=read, args=(process,), daemon=True).start()
    left = len(started)
    while left:
        line = found.get()
        if line is None:
            left -= 1
        else:
            yield Outcome(**json.loads(line))
    for process in started:
        if process.wait() != 0:
            raise RuntimeError(f"a worker ended with {process.returncode}")


def attack_all(count: int, seed: int = 0) -> Iterator[tuple[str, list[str]]]:
    """Name of each case, and what was wrong with how it ended: for `benchmarks/attack.py`."""
    from bundle_fixtures import Ingredients

    with tempfile.TemporaryDirectory() as place:
        good = Ingredients(Path(place)).make(Path(place) / "out" / "quickstart-jetson-orin-nano")
        for one in outcomes(
            good, Path(place) / "scratch", range(count), seed=seed, workers=len(os.sched_getaffinity(0))
        ):
            yield one.what, [f"{one.fault}: {one.said[-300:]}"] if one.fault else []


def main() -> None:
    good, scratch, seed, first, last, command, replay, worker, workers = sys.argv[1:]
    warm()
    for number in range(int(first) + int(worker), int(last), int(workers)):
        one = attack(Path(good), Path(scratch), int(seed), number, command=command, replay=replay == "replay")
        print(json.dumps(asdict(one)), flush=True)


if __name__ == "__main__":
    main()
