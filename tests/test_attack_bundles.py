"""Changed bundles, by the real command: none is accepted, slow, large, or does anything. See benchmarks/attack.py too.

The command runs in forks of one process that has imported it: a fresh one is not needed to see what it does.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from attack.run_bundles import Outcome, outcomes
from bundle_fixtures import Ingredients

CASES = 240


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    return Ingredients(folder).make(folder / "out" / "quickstart-jetson-orin-nano")


def faults(found: list[Outcome]) -> list[tuple[int, str, str, str]]:
    return [(one.number, one.what, one.fault, one.said[-500:]) for one in found if one.fault]


def test_verify_accepts_no_change(good: Path, tmp_path: Path) -> None:
    found = list(outcomes(good, tmp_path, range(CASES), replay=False))
    assert len(found) == CASES
    assert faults(found) == []
    refused = [one for one in found if one.code == 2]
    assert len(refused) > 0.97 * CASES, "the rest say how text is cut beside the artifact, and every document fits it"


def test_what_only_the_runtime_can_tell(good: Path, tmp_path: Path) -> None:
    found = list(outcomes(good, tmp_path, range(20_000, 20_060), replay=True))
    assert faults(found) == []


def test_report_refuses_or_writes_and_never_throws(good: Path, tmp_path: Path) -> None:
    found = list(outcomes(good, tmp_path, range(1000, 1080), command="report", replay=False))
    assert faults(found) == []


def test_a_good_bundle_passes_the_same_way(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from attack import run_bundles

    monkeypatch.setattr(run_bundles, "change", lambda *_, **__: run_bundles.Changed("nothing"))
    monkeypatch.setenv("EDGEDISTILL_STORE", str(tmp_path / "store"))
    one = run_bundles.attack(good, tmp_path / "scratch", 0, 0)
    assert (one.code, one.fault) == (0, "accepted"), one.said
