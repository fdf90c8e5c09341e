"""Nothing wrong passes: planted faults, changed bundles and hostile inputs, seeded, far more of them than the tests run.

    python benchmarks/attack.py --check                      all parts
    python benchmarks/attack.py bundles --count 500 --seed 3

Parts that are named have a result of their own (attack_bundles.json).

Every part gives the name of each case and what was wrong with how it ended; nothing may be.
"""

from __future__ import annotations

import collections
import importlib
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "helpers"))

from common import Bound, finish, parser

# part → module:function of tests/, called with a count and a seed, and the count of a full run
PARTS = {
    "bundles": ("attack.run_bundles:attack_all", 10_000),
    "inputs": ("attack.run_inputs:attack", 1_000),
    "faults": ("attack.run_faults:attack", 90),
}
SHOWN = 20


def main() -> None:
    asked = parser(__doc__)
    asked.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    asked.add_argument("--count", type=int, help="cases of each part")
    asked.add_argument("--seed", type=int, default=0)
    arguments = asked.parse_args()
    figures, rows, bounds, notes = {}, [], [], []
    for part in arguments.parts or PARTS:
        where, full = PARTS[part]
        module, function = where.split(":")
        started = time.monotonic()
        kinds: collections.Counter[str] = collections.Counter()
        wrong: list[str] = []
        for name, faults in getattr(importlib.import_module(module), function)(arguments.count or full, arguments.seed):
            kinds[name.split(":")[0].split(" ")[0]] += 1
            for fault in faults:
                wrong.append(f"{name}: {fault}")
                print(wrong[-1], file=sys.stderr, flush=True)
        seconds, cases = time.monotonic() - started, kinds.total()
        figures[part] = {"cases": cases, "wrong": wrong, "seconds": seconds, "seed": arguments.seed}
        rows.append((part, f"{cases:,}", str(len(wrong)), f"{seconds:,.0f}"))
        bounds += [
            Bound(f"{part}: cases that ended as they should not", len(wrong), "<=", 0),
            Bound(f"{part}: cases", cases, ">=", arguments.count or full),
        ]
        notes += wrong[:SHOWN]
    finish(
        "_".join(["attack", *arguments.parts]), arguments, figures=figures, header=("part", "cases", "wrong", "seconds"), rows=rows, bounds=bounds, notes=notes
    )  # fmt: skip


if __name__ == "__main__":
    main()
