"""Start-up of the commands that a person types most (medians of fresh processes): --help at most 0.2 s, targets list 0.2 s."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from common import Bound, finish, parser

COMMANDS = (("--help",), ("targets", "list"))


def main() -> None:
    asked = parser(__doc__)
    asked.add_argument("--runs", type=int, default=15)
    arguments = asked.parse_args()
    samples: dict[str, list[float]] = {" ".join(words): [] for words in COMMANDS}
    for _ in range(arguments.runs):
        for words in COMMANDS:
            started = time.perf_counter()
            subprocess.run([sys.executable, "-m", "edgedistill", *words], check=True, stdout=subprocess.DEVNULL)
            samples[" ".join(words)].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    finish(
        "startup",
        arguments,
        figures={name: {"median_s": medians[name], "samples_s": values} for name, values in samples.items()},
        header=("command", "median (s)", "slowest (s)"),
        rows=[(name, f"{medians[name]:.3f}", f"{max(values):.3f}") for name, values in samples.items()],
        bounds=[Bound(f"edgedistill {name}, seconds", value, "<=", 0.2) for name, value in medians.items()],
    )


if __name__ == "__main__":
    main()
