from __future__ import annotations

import json
import os
import platform

from edgedistill.machine import facts

JETSON = """processor\t: 0
Features\t: fp asimd evtstrm aes crc32 atomics fphp asimdhp asimddp
CPU implementer\t: 0x41
CPU part\t: 0xd42

processor\t: 1
Features\t: fp asimd evtstrm aes crc32 atomics fphp asimdhp asimddp
CPU implementer\t: 0x41
CPU part\t: 0xd42
"""
BIG_LITTLE = """processor\t: 0
Features\t: asimd asimddp
CPU implementer\t: 0x41
CPU part\t: 0xd80

processor\t: 1
Features\t: asimd asimddp i8mm
CPU implementer\t: 0x41
CPU part\t: 0xd82
"""


def test_describe_tells_of_this_machine_and_is_json() -> None:
    found = facts.describe()
    assert json.loads(json.dumps(found)) == found
    assert found["cores"] == os.cpu_count()
    assert 1 <= found["usable_cores"] <= found["cores"]
    assert found["memory_bytes"] > 1 << 28
    assert found["python"] == platform.python_version()
    assert found["cpu"] and found["machine"] and found["os"]
    assert platform.node() not in json.dumps(found) or len(platform.node()) < 4


def test_isa_names_are_those_of_target_profiles() -> None:
    cpu, flags = facts.parse_cpuinfo(JETSON)
    assert cpu == "2× Cortex-A78AE"
    assert facts._isa(flags) == ["dotprod", "fp16", "neon"]


def test_only_what_every_core_has_counts() -> None:
    cpu, flags = facts.parse_cpuinfo(BIG_LITTLE)
    assert cpu == "1× Cortex-A520 + 1× Cortex-X4"
    assert "i8mm" not in facts._isa(flags)
    assert "dotprod" in facts._isa(flags)


def test_x86_model_and_flags() -> None:
    cpu, flags = facts.parse_cpuinfo("model name\t: Some CPU @ 2 GHz\nflags\t: fpu avx2 fma amx_int8 avx512_vnni\n")
    assert cpu == "Some CPU @ 2 GHz"
    assert facts._isa(flags) == ["amx_int8", "avx2", "avx512_vnni", "fma"]


def test_fingerprint_is_stable_and_follows_the_flags(monkeypatch) -> None:
    first = facts.fingerprint()
    assert first == facts.fingerprint() and len(first) == 16
    monkeypatch.setattr(facts, "_cpu", lambda: ("Some CPU", ["avx2"]))
    second = facts.fingerprint()
    monkeypatch.setattr(facts, "_cpu", lambda: ("Some CPU", ["avx2", "amx_int8"]))
    assert len({first, second, facts.fingerprint()}) == 3
