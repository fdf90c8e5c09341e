"""One distillation of a real teacher, three bundles: `build --teacher ... --data ... --target` three times.

Claims: three bundles verify; the student was trained once; the lower end of each retention interval reaches the
gate of 0.80. What the store named by EDGEDISTILL_STORE has is reused: the training's seconds come from its record.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common import Bound, finish, parser

from edgedistill.cli.show import with_interval

DATA = Path(os.environ.get("EDGEDISTILL_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
TARGETS = ("jetson", "phone", "server-gpu")


def main() -> None:
    asked = parser(__doc__)
    asked.add_argument("--teacher", default=str(DATA / "weights" / "teacher-tinystories-21m"))
    asked.add_argument("--data", default=str(DATA / "text_lm" / "tinystories" / "tinystories_lowercase_4MB.txt"))
    arguments = asked.parse_args()
    targets = [word for target in TARGETS for word in ("--target", target)]
    with tempfile.TemporaryDirectory(prefix="edgedistill-own-") as out:
        command = [
            sys.executable,
            "-m",
            "edgedistill",
            "build",
            "--teacher",
            arguments.teacher,
            "--data",
            arguments.data,
        ]
        done = subprocess.run(
            [*command, "--set", "data.split=tail", *targets, "--out", out, "--json"],
            check=True, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        built = json.loads(done.stdout)
        verified = [
            subprocess.run(
                [sys.executable, "-m", "edgedistill", "bundle", "verify", b["bundle"]], check=False
            ).returncode
            for b in built["bundles"]
        ]
    training = built["student"]["training"]
    rows, bounds = [], [Bound("bundles that verify", float(verified.count(0)), ">=", 3)]
    figures = {
        "teacher_parameters": built["teacher"]["parameters"],
        "student_parameters": built["student"]["parameters"],
        "training": {
            name: training[name] for name in ("steps", "tokens", "seconds", "tokens_per_s", "best_step", "loss")
        },
        "bundles": {},
    }
    for bundle in built["bundles"]:
        rungs = {r["rung"]: r for r in bundle["artifacts"][0]["retention"]["rungs"]}
        shipped = rungs["shipped"]
        name = bundle["target"]
        figures["bundles"][name] = {rung: r["perplexity"] for rung, r in rungs.items()} | {
            "retention": shipped["retention"],
            "retention_ci95": shipped["retention_ci95"],
            "kl_mean_nats": shipped["kl_mean_nats"],
            "top1_agreement": shipped["top1_agreement"],
        }
        artifact = bundle["artifacts"][0]["artifact"]
        rows.append(
            (name, f"{artifact['format']}:{artifact['quantization']}", f"{artifact['bytes'] / 1e6:.2f} MB",
             *(f"{rungs[r]['perplexity']:.2f}" for r in ("teacher", "student", "quantized", "shipped")),
             with_interval(shipped["retention"], shipped["retention_ci95"]))
        )  # fmt: skip
        bounds.append(
            Bound(f"{name}: retention, interval's lower end", (shipped["retention_ci95"] or [0.0])[0], ">=", 0.80)
        )
    finish(
        "own_teacher",
        arguments,
        figures=figures,
        header=("target", "artifact", "size", "teacher", "student", "quantized", "shipped", "retention"),
        rows=rows,
        bounds=bounds,
        notes=[f"trained once: {training['tokens']:,} tokens in {training['seconds']:.0f} s"],
    )


if __name__ == "__main__":
    main()
