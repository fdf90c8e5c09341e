"""A drafted profile of this machine: valid, measured where it says so, and recognised as this machine."""

from __future__ import annotations

import pytest

from edgedistill.config.probe import measure_copy_bandwidth, targets_probe
from edgedistill.config.targets import is_this_machine, parse_target, target_yaml
from edgedistill.machine.facts import describe


def test_the_draft_is_valid_measured_and_this_machine() -> None:
    machine = describe()
    target = targets_probe(machine, buffer_bytes=32 << 20)
    assert parse_target(target_yaml(target), where="draft") == target
    assert target.bandwidth_bytes_per_s.basis == target.memory_bytes.basis == "measured"
    assert target.memory_bytes.value == machine["memory_bytes"]
    assert target.usable_memory_bytes.basis == "derived"
    assert target.bench.threads == machine["usable_cores"]
    assert is_this_machine(target, machine)
    for other in ({"machine": "other", "cpu": "other"}, {"isa": []}, {"cores": 0}, {"memory_bytes": 1 << 20}):
        assert not is_this_machine(target, machine | other), other
    # Slower than any machine that runs Python today, or faster than any memory: the measurement is broken.
    assert 1e8 < target.bandwidth_bytes_per_s.value < 1e14


def test_an_arm_board_is_drafted_from_its_description() -> None:
    board = {"machine": "Radxa ROCK 5B", "cpu": "4× Cortex-A76 + 4× Cortex-A55", "arch": "aarch64", "isa": ["dotprod"],
             "cores": 8, "usable_cores": 8, "memory_bytes": 8 << 30, "gpu": []}  # fmt: skip
    target = targets_probe(board, buffer_bytes=1 << 20)
    assert (target.name, target.arch, target.default_artifacts) == ("radxa-rock-5b", "aarch64", ["gguf:Q4_0"])
    assert is_this_machine(target, board)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_whole_buffer_is_copied(threads: int) -> None:
    assert measure_copy_bandwidth(1 << 20, threads=threads, repeats=1) > 0
    assert measure_copy_bandwidth(1, threads=threads, repeats=1) > 0
