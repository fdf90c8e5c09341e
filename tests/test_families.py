"""Every family of the table from end to end, by the command line: a teacher that knows something, a student cut out of
it, planned, trained, exported, verified, timed and bundled, and the bundle verified."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command import Command, refused
from family_models import TEACHERS, teacher

QUICK = ("--set", "distill.tokens=12_000", "--set", "student.compression=2")


def build(folder: Path, model: Path, *more: str) -> dict[str, Any]:
    """The manifest of the bundle that a build from this teacher leaves, after `bundle verify` took it."""
    command = Command(folder, warm=True)
    done = command("build", command.recipe(), "-t", "phone", "--teacher", str(model), *QUICK, *more)
    assert done.returncode == 0, done.stderr
    bundle = folder / "bundles" / "tiny-phone-arm64-high"
    verified = command("bundle", "verify", str(bundle))
    assert verified.returncode == 0, verified.stderr
    return dict(json.loads((bundle / "manifest.json").read_text()))


@pytest.mark.parametrize("family", list(TEACHERS))
def test_from_teacher_to_verified_bundle(family: str, tmp_path: Path) -> None:
    model = teacher(tmp_path / "teacher", family)
    manifest = build(tmp_path, model, "--set", "student.start=both")
    student = manifest["student"]
    assert student["shape"]["family"] == family
    assert student["parameters"] < manifest["teacher"]["parameters"]


def test_another_format_is_refused_by_the_plan(tmp_path: Path) -> None:
    model = teacher(tmp_path / "teacher", "granite", steps=0)
    command = Command(tmp_path, warm=True)
    done = command(
        "plan", command.recipe(), "-t", "phone", "--teacher", str(model), "--set", "export.artifacts=onnx:INT4"
    )
    refused(done, "a granite decoder becomes GGUF alone")


def test_a_cap_that_llama_cpp_has_not_is_refused_by_the_plan(tmp_path: Path) -> None:
    model = teacher(tmp_path / "teacher", "gemma2", steps=0)
    command = Command(tmp_path, warm=True)
    settings = json.loads((model / "config.json").read_text()) | {"query_pre_attn_scalar": 100}
    (model / "config.json").write_text(json.dumps(settings))
    done = command("plan", command.recipe(), "-t", "phone", "--teacher", str(model))
    refused(done, "query_pre_attn_scalar is 100")
