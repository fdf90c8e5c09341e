"""How long the quickstart takes from an empty store, teacher included, and a second target after it.

Claims, on two cores with AVX-512 and without AMX: `build --target jetson` at most 3 minutes, and `build --target phone`
after it at most 60 s. A machine without AVX-512 is outside the first claim: its time is shown and held to no bound.
Run it on a machine that does nothing else: beside other work the training threads get their share of the cores.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import Bound, finish, parser

from edgedistill.cli.show import with_interval
from edgedistill.machine import facts

README = Path(__file__).resolve().parent.parent / "README.md"
MARKED = re.compile(r"(<!-- result:begin -->\n).*?(<!-- result:end -->)", re.DOTALL)


def timed_build(target: str, store: Path, out: Path) -> tuple[float, dict[str, Any]]:
    command = [sys.executable, "-m", "edgedistill", "build", "--target", target, "--out", str(out), "--json"]
    started = time.monotonic()
    done = subprocess.run(
        command, env={**os.environ, "EDGEDISTILL_STORE": str(store)}, check=True, stdout=subprocess.PIPE, text=True
    )
    return time.monotonic() - started, json.loads(done.stdout)


def readme_table(builds: list[dict[str, Any]], cpu: str, threads: int, date: str, minutes: float) -> str:
    """The result table as Markdown; every figure from the builds' own records."""
    first = builds[0]
    teacher = first["bundles"][0]["artifacts"][0]["retention"]["rungs"][0]
    lines = [
        "| target | artifact | size | perplexity | retention of the teacher | decode (proxy) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for build in builds:
        for bundle in build["bundles"]:
            for done in bundle["artifacts"]:
                artifact, latency, rung = done["artifact"], done["latency"], done["retention"]["rungs"][-1]
                lines.append(
                    f"| {bundle['target']} | {artifact['format'].upper()} {artifact['quantization']} |"
                    f" {artifact['bytes'] / 1e6:.2f} MB | {with_interval(rung['perplexity'], rung['perplexity_ci95'], '.1f')} |"
                    f" {with_interval(rung['retention'], rung['retention_ci95'])} |"
                    f" {latency['decode_tokens_per_s']:,.0f} tokens/s |"
                )
    lines += [
        "",
        f"Quickstart of {date}: teacher {first['teacher']['parameters']:,} parameters, perplexity"
        f" {with_interval(teacher['perplexity'], teacher['perplexity_ci95'], '.1f')};"
        f" student {first['student']['parameters']:,} parameters."
        " Retention is measured on the shipped bytes in llama.cpp; intervals are 95 %, over documents."
        f" Speed is a proxy: measured on {cpu} with {threads} threads, not on the target."
        f" The first build took {minutes:.1f} minutes from an empty store on two cores, teacher included.",
    ]
    return "\n".join(lines)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--readme", action="store_true", help="put the result table into README.md")
    asked = arguments.parse_args()
    with tempfile.TemporaryDirectory(prefix="edgedistill-quickstart-") as folder:
        store, out = Path(folder) / "store", Path(folder) / "bundles"
        first_s, jetson = timed_build("jetson", store, out)
        second_s, phone = timed_build("phone", store, out)
    latency = jetson["bundles"][0]["artifacts"][0]["latency"]
    if asked.readme:
        date = time.strftime("%Y-%m-%d", time.gmtime())
        made = readme_table(
            [jetson, phone], latency["measured_on"]["cpu"], latency["measured_on"]["threads"], date, first_s / 60
        )
        text, count = MARKED.subn(lambda m: f"{m[1]}{made}\n{m[2]}", README.read_text(encoding="utf-8"))
        if count != 1:
            sys.exit("README.md has no result markers")
        README.write_text(text, encoding="utf-8")
    rows = []
    figures: dict[str, Any] = {}
    for name, seconds, build in (("jetson, empty store", first_s, jetson), ("phone, after it", second_s, phone)):
        rung = build["bundles"][0]["artifacts"][0]["retention"]["rungs"][-1]
        teacher, student = build["teacher"]["training"], build["student"]["training"]
        figures[name] = {
            "seconds": seconds,
            "teacher_s": teacher["seconds"],
            "teacher_tokens_per_s": teacher["tokens_per_s"],
            "student_s": student["seconds"],
            "student_tokens_per_s": student["tokens_per_s"],
            "retention": rung["retention"],
            "retention_ci95": rung["retention_ci95"],
        }
        rows.append(
            (
                name,
                f"{seconds:.1f}",
                f"{teacher['seconds']:.1f}",
                f"{student['seconds']:.1f}",
                f"{rung['retention']:.3f}",
            )
        )
    claimed = any(name.startswith("avx512") for name in facts.describe()["isa"])
    finish(
        "quickstart",
        asked,
        figures=figures,
        header=("build", "seconds", "teacher's training (s)", "student's training (s)", "retention"),
        rows=rows,
        bounds=[
            *([Bound("quickstart for jetson from an empty store, seconds", first_s, "<=", 180)] if claimed else []),
            Bound("phone after it, seconds", second_s, "<=", 60),
        ],
        notes=[
            "The training times of the second row are those of the first build: nothing was trained again.",
            *([] if claimed else ["The first claim is about CPUs with AVX-512; this one has none."]),
        ],
    )


if __name__ == "__main__":
    main()
