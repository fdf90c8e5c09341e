"""Exported bytes, twenty losses and the shape of records are what pins.json says: see pins.py."""

from __future__ import annotations

import json
from importlib.metadata import version

import pins
import pytest

PINNED = json.loads(pins.PINS.read_text())
SAME_LIBRARIES = PINNED["versions"] == {name: version(name) for name in pins.LIBRARIES}


@pytest.mark.skipif(not SAME_LIBRARIES, reason="bytes are pinned for other versions of the libraries: see pins.json")
def test_exports_are_the_same_bytes(tmp_path):
    found, pinned = pins.exports(tmp_path), PINNED["exports"]
    assert found.keys() == pinned.keys()
    if pins.machine() != PINNED["machine"]:  # elsewhere what is copied or rounded number by number alone
        found, pinned = ({name: each[name] for name in ("gguf F16", "gguf Q8_0")} for each in (found, pinned))
    assert found == pinned


def test_twenty_losses(tmp_path):
    found = pins.losses(tmp_path)
    assert len(found) == pins.STEPS
    assert found == pytest.approx(PINNED["losses"], rel=1e-4)


def test_a_build_leaves_the_same_records(tmp_path):
    found, pinned = pins.records(tmp_path), PINNED["records"]
    assert found["files"] == pinned["files"]
    for name, keys in pinned["keys"].items():
        assert found["keys"][name] == keys, name
    assert found["perplexity"] == pytest.approx(pinned["perplexity"], rel=0.02)
