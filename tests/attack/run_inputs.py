"""The long run of hostile inputs: `python -P tests/attack/run_inputs.py 1000 [seed]`."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "helpers"), str(TESTS.parent)]

from attack.command_server import Server  # noqa: E402
from attack.inputs import Good, cases, run_case  # noqa: E402


def good_inputs(folder: Path) -> Good:
    """A tiny model, its text, the quickstart's recipe and a profile."""
    from command import tiny_text
    from tiny_models import tiny_checkpoint

    from edgedistill.config.recipe import load_recipe
    from edgedistill.config.targets import load_target

    text = folder / "text.txt"
    text.write_text(tiny_text(60))
    recipe = load_recipe().model_dump(mode="json")
    profile = load_target("cpu-x86").model_dump(mode="json", exclude_none=True) | {"name": "mine", "aliases": []}
    return Good(tiny_checkpoint(folder / "model", hidden=64), text, recipe, profile)


def attack(count: int, seed: int = 0) -> Iterator[tuple[str, list[str]]]:
    """Name of each case, and what was wrong with how it ended."""
    slower = min(6.0, max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)))
    with tempfile.TemporaryDirectory() as place, Server() as server:
        good = good_inputs(Path(place))
        for case in cases(good, seed, count):
            with tempfile.TemporaryDirectory(dir=place) as folder:
                number, _, kind = case.name.partition(" ")
                yield f"{kind}: #{number}", run_case(case, Path(folder), server, slower=slower)


if __name__ == "__main__":
    failed = 0
    for number, (_, wrong) in enumerate(attack(int(sys.argv[1]), int((sys.argv[2:] or ["0"])[0]))):
        failed += bool(wrong)
        print("\n".join(wrong) if wrong else f"{number} ok", flush=True)
    print(f"{failed} of {sys.argv[1]} failed")
