"""Fixtures shared by all tests. Real data: the folder named by EDGEDISTILL_TEST_DATA, else ../shared/data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

if "PYTEST_XDIST_WORKER" in os.environ:
    # Several of these at once, before torch and llama.cpp are loaded: threads that spin while they wait for each other
    # would take the cores of the other workers, and everything five times as long.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real data and weights; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("EDGEDISTILL_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}: name it in EDGEDISTILL_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return ROOT
