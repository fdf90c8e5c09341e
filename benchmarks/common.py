"""What every benchmark shares: arguments, where a result was measured, and its dated file in results/."""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedistill.cli.show import table, with_interval
from edgedistill.machine import facts
from edgedistill.statistics import Estimate
from edgedistill.store import versions

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("edgedistill", "torch", "transformers", "tokenizers", "llama-cpp-python", "gguf", "onnxruntime")


@dataclass(frozen=True)
class Bound:
    """A claim: `value` must be at most (or at least) `bound`."""

    what: str
    value: float
    relation: str
    bound: float

    @property
    def met(self) -> bool:
        return self.value <= self.bound if self.relation == "<=" else self.value >= self.bound


def as_list(found: Estimate) -> list[float | None]:
    """Value, lower and upper end, which are null where there are too few units."""
    return [found.value, *(found.ci95 or (None, None))]


def as_text(found: Estimate, form: str = ".3f") -> str:
    return with_interval(found.value, found.ci95, form)


def lower(found: Estimate) -> float:
    return float("-inf") if found.ci95 is None else found.ci95[0]


def upper(found: Estimate) -> float:
    return float("inf") if found.ci95 is None else found.ci95[1]


def parser(description: str | None) -> argparse.ArgumentParser:
    """--json, --check, --save; a script adds its own."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--json", action="store_true", help="one JSON document on standard output")
    made.add_argument("--check", action="store_true", help="exit 1 where a stated bound is not met")
    made.add_argument("--save", action="store_true", help="write benchmarks/results/<name>.json")
    return made


def finish(
    name: str, arguments: argparse.Namespace, *, figures: dict[str, Any], rows: Sequence[Sequence[str]],
    header: Sequence[str], bounds: Sequence[Bound], notes: Sequence[str] = (),
) -> None:  # fmt: skip
    """Print the table (or JSON), save the result where asked, and exit 1 where --check finds a bound broken."""
    checked = [
        {"what": b.what, "value": b.value, "relation": b.relation, "bound": b.bound, "met": b.met} for b in bounds
    ]
    document = {
        "benchmark": name,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "basis": "measured",
        "machine": facts.describe(),
        "versions": versions(*PACKAGES),
        "figures": figures,
        "bounds": checked,
        "notes": list(notes),
    }
    if arguments.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if arguments.json:
        print(json.dumps(document, indent=1))
    else:
        print(table("", header, rows))
        shown = [(b.what, f"{b.value:.4g}", f"{b.relation} {b.bound:g}", "met" if b.met else "NOT MET") for b in bounds]
        print(table("", ("claim", "value", "bound", ""), shown))
        print("\n".join(notes))
    if arguments.check and not all(b.met for b in bounds):
        sys.exit(1)
