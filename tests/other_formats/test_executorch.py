"""ExecuTorch programs: exported and run by an interpreter that has it; the refusals need none."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
from checkpoints import tiny

from edgedistill.errors import RuntimeCrashed, UserError
from edgedistill.export.stage import write_artifact
from edgedistill.other_formats.executorch import INTERPRETER, LIMITS
from edgedistill.records.artifact import Artifact

here = importlib.util.find_spec("executorch") is not None or INTERPRETER in os.environ
needs_executorch = pytest.mark.skipif(not here, reason=f"no executorch here, and {INTERPRETER} names no interpreter")


def exported(checkpoint: Path, out: Path, quantization: str) -> Artifact:
    return write_artifact(
        checkpoint, out, format_="executorch", quantization=quantization, context_tokens=128, name="tiny"
    )


@needs_executorch
@pytest.mark.parametrize("quantization", ["FP32", "8DA4W"])
def test_the_program_gives_torchs_logits(tmp_path: Path, quantization: str) -> None:
    made = exported(tiny(tmp_path / "model"), tmp_path / "out", quantization)
    assert made.entry == "model.pte" and made.runtime == "executorch"
    assert {file.path for file in made.files} == {"model.pte", "tokenizer.json", "tokenizer_config.json"}
    assert made.parity is not None and made.parity.relative_rms <= made.parity.limit == LIMITS[quantization]
    assert made.tool_versions["executorch"] and made.tool_versions["torch"]


def test_an_interpreter_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(INTERPRETER, str(tmp_path))
    with pytest.raises(UserError, match="is not a program"):
        exported(tiny(tmp_path / "model"), tmp_path / "out", "FP32")


@pytest.mark.skipif(importlib.util.find_spec("executorch") is not None, reason="executorch is installed here")
@pytest.mark.parametrize("named", [False, True])
def test_an_interpreter_without_executorch_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    if named:
        monkeypatch.setenv(INTERPRETER, sys.executable)
    else:
        monkeypatch.delenv(INTERPRETER, raising=False)
    with pytest.raises(UserError, match=r"(?s)executorch.*|ExecuTorch is not installed") as caught:
        exported(tiny(tmp_path / "model"), tmp_path / "out", "FP32")
    assert INTERPRETER in caught.value.remedy
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_an_interpreter_that_dies_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(INTERPRETER, "/bin/false")
    with pytest.raises(RuntimeCrashed, match="ExecuTorch failed"):
        exported(tiny(tmp_path / "model"), tmp_path / "out", "FP32")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_width_that_has_no_groups_is_refused(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path / "model", intermediate_size=80)
    with pytest.raises(UserError, match="matrices with 80 columns"):
        exported(checkpoint, tmp_path / "out", "8DA4W")
