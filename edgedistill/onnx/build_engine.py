#!/usr/bin/env python3
"""Build a TensorRT engine of the graph beside this file on the device that runs it, compare it and time it.

Needs TensorRT 10 (JetPack 6.1 and later) with its trtexec, and Python 3.10; nothing else. An engine runs only on the
kind of GPU and the version of TensorRT that it was built with.

    python3 build_engine.py [--trtexec PATH] [--axis sequence=1,64,128]
"""

from __future__ import annotations

import argparse
import array
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SETTINGS = "tensorrt.json"
ON_A_JETSON = "/usr/src/tensorrt/bin/trtexec"
BANNER = re.compile(r"\[TensorRT v(\d+)\]")
TIMED_RUNS = 200
WARM_UP_MS = 500


def version_of(number: int) -> tuple[int, int]:
    """trtexec's banner → (major, minor): 8503 is 8.5.3, 100300 is 10.3.0."""
    return (number // 10000, number // 100 % 100) if number >= 100_000 else (number // 1000, number // 100 % 10)


def shapes(inputs: list[dict[str, Any]], axes: dict[str, list[int]], which: int) -> str:
    """The profile's shapes as trtexec takes them; `which`: 0 smallest, 1 usual, 2 largest."""
    parts = []
    for entry in inputs:
        sizes = [str(dim if isinstance(dim, int) else axes[dim][which]) for dim in entry["shape"]]
        parts.append(f"{entry['name']}:{'x'.join(sizes)}")
    return ",".join(parts)


def build_command(trtexec: str, settings: dict[str, Any], axes: dict[str, list[int]], engine: Path) -> list[str]:
    """Types as the graph has them (FP32, FP16, INT8 by its Q/DQ nodes), float32 products without TF32's rounding."""
    command = [trtexec, f"--onnx={HERE / settings['file']}", f"--saveEngine={engine}", "--stronglyTyped", "--noTF32"]
    if axes:
        names = ("minShapes", "optShapes", "maxShapes")
        command += [f"--{name}={shapes(settings['inputs'], axes, i)}" for i, name in enumerate(names)]
    return [*command, "--skipInference"]


def run_command(trtexec: str, engine: Path, case: dict[str, Any], output: Path) -> list[str]:
    """One run of a golden case, its outputs written as JSON."""
    given = ",".join(f"{name}:{'x'.join(map(str, entry['shape']))}" for name, entry in case["inputs"].items())
    files = ",".join(f"{name}:{HERE / entry['file']}" for name, entry in case["inputs"].items())
    return [
        trtexec, f"--loadEngine={engine}", f"--shapes={given}", f"--loadInputs={files}", f"--exportOutput={output}",
        "--iterations=1", "--warmUp=0", "--duration=0",
    ]  # fmt: skip


def relative_rms(found: list[float], expected: list[float]) -> float:
    """Root mean square of the difference over the spread of `expected`; infinite where a value is no number."""
    if len(found) != len(expected) or not all(math.isfinite(value) for value in found):
        return math.inf
    mean = sum(expected) / len(expected)
    spread = math.sqrt(sum((value - mean) ** 2 for value in expected) / len(expected))
    error = math.sqrt(sum((a - b) ** 2 for a, b in zip(found, expected, strict=True)) / len(expected))
    return error / spread if spread > 0 else error


def compare(exported: list[dict[str, Any]], case: dict[str, Any]) -> float:
    """The largest error of a case's outputs, as trtexec exported them."""
    found = {entry["name"]: entry for entry in exported}
    worst = 0.0
    for name, entry in case["outputs"].items():
        expected = array.array("f")
        expected.frombytes((HERE / entry["file"]).read_bytes())
        if sys.byteorder == "big":
            expected.byteswap()
        if name not in found or found[name]["dimensions"] != "x".join(map(str, entry["shape"])):
            return math.inf
        worst = max(worst, relative_rms([float(value) for value in found[name]["values"]], list(expected)))
    return worst


def percentile(values: list[float], share: float) -> float:
    """Linear between samples."""
    ordered, place = sorted(values), share * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def axes_of(settings: dict[str, Any], changes: list[str]) -> dict[str, list[int]]:
    """The profile's axes with what the command line changes. SystemExit for what is no axis or no range."""
    axes = dict(settings["axes"])
    for change in changes:
        name, _, sizes = change.partition("=")
        if name not in axes:
            raise SystemExit(f"no axis {name!r}; the graph has {', '.join(axes) or 'none that vary'}")
        try:
            low, usual, high = (int(size) for size in sizes.split(","))
        except ValueError:
            raise SystemExit(f"--axis {change}: write {name}=SMALLEST,USUAL,LARGEST") from None
        if not 1 <= low <= usual <= high:
            raise SystemExit(f"--axis {change}: the sizes must rise")
        axes[name] = [low, usual, high]
    for case in settings["cases"]:
        for entry in settings["inputs"]:
            for dim, size in zip(entry["shape"], case["inputs"][entry["name"]]["shape"], strict=True):
                if isinstance(dim, str) and not axes[dim][0] <= size <= axes[dim][2]:
                    raise SystemExit(f"axis {dim} must hold the golden vectors' {size}, and is {axes[dim]}")
    return axes


def call(command: list[str]) -> str:
    """What it printed. SystemExit with its last lines where it failed."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        tail = "\n  ".join(done.stdout.strip().splitlines()[-8:])
        raise SystemExit(f"{Path(command[0]).name} ended with {done.returncode}; its last lines:\n  {tail}")
    return done.stdout


def require_version(text: str, least: list[int]) -> tuple[int, int] | None:
    """The version in trtexec's output, None where it is not told. SystemExit for one that is too old."""
    banner = BANNER.search(text)
    if banner is None:
        return None
    found = version_of(int(banner.group(1)))
    if found < tuple(least):
        wanted = ".".join(map(str, least))
        raise SystemExit(f"TensorRT {found[0]}.{found[1]} is too old: this graph needs {wanted} (JetPack 6.1 has 10.3)")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trtexec", default=shutil.which("trtexec") or ON_A_JETSON)
    parser.add_argument("--axis", action="append", default=[], help="NAME=SMALLEST,USUAL,LARGEST of one that varies")
    args = parser.parse_args()
    settings = json.loads((HERE / SETTINGS).read_text(encoding="utf-8"))
    axes = axes_of(settings, args.axis)
    if shutil.which(args.trtexec) is None:
        raise SystemExit(f"no trtexec at {args.trtexec}: install TensorRT (part of JetPack), or name it with --trtexec")
    version = require_version(call([args.trtexec, "--help"]), settings["minimum_version"])
    engine = HERE / "model.engine"
    print(f"building {engine.name}; this takes minutes", flush=True)
    told = require_version(call(build_command(args.trtexec, settings, axes, engine)), settings["minimum_version"])
    version = version or told
    errors = []
    with tempfile.TemporaryDirectory() as scratch:
        output, times = Path(scratch) / "output.json", Path(scratch) / "times.json"
        for number, case in enumerate(settings["cases"]):
            call(run_command(args.trtexec, engine, case, output))
            errors.append(compare(json.loads(output.read_text(encoding="utf-8")), case))
            print(f"golden case {number}: off by {errors[-1]:.3g} of its spread, limit {settings['limit']:g}")
        timed = [args.trtexec, f"--loadEngine={engine}", f"--exportTimes={times}", f"--warmUp={WARM_UP_MS}"]
        timed += [f"--iterations={TIMED_RUNS}", f"--shapes={shapes(settings['inputs'], axes, 1)}"]
        call(timed)
        samples = [float(run["latencyMs"]) for run in json.loads(times.read_text(encoding="utf-8"))]
    latency = {f"p{share}": percentile(samples, share / 100) for share in (50, 90, 99)}
    report = {
        "tensorrt": None if version is None else ".".join(map(str, version)),
        "axes": axes,
        "shapes_timed": shapes(settings["inputs"], axes, 1),
        "relative_rms": errors,
        "limit": settings["limit"],
        "latency_ms": latency,
        "samples": len(samples),
    }
    (HERE / "engine.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    shown = ", ".join(f"{name} {value:.3f} ms" for name, value in latency.items())
    print(f"latency {shown} of {len(samples)} runs")
    if not all(error <= settings["limit"] for error in errors):
        engine.unlink()
        print("the engine does not compute what the graph does: it was removed", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
