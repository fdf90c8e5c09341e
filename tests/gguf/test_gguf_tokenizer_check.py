"""Every exported GGUF's tokenizer is tried in llama.cpp: what differs is noted and warned about, or refused."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
from checkpoints import byte_level_bpe, edit_json, tiny

from edgedistill.errors import UserError
from edgedistill.export.stage import export_model
from edgedistill.gguf.pretokenizers import NEW_CHARACTERS_NOTE
from edgedistill.gguf.tokenizer_bpe import NFC_NOTE
from edgedistill.models.folder import open_model, weights_sha256
from edgedistill.progress import Progress
from edgedistill.records.artifact import Artifact
from edgedistill.store import Store
from edgedistill.verify.tokenizer_check import with_checked_tokenizer


def exported(checkpoint: Path, store: Path, stream: io.StringIO) -> tuple[Artifact, Path]:
    stored = export_model(
        checkpoint, "gguf:F16", context_tokens=64, name="tiny", tokenizer_sha256="0" * 64,
        weights_sha256=weights_sha256(open_model(str(checkpoint)), Store(store)),
        store=Store(store), progress=Progress(stream=stream),
    )  # fmt: skip
    return stored.result, stored.directory


def test_what_differs_is_noted_and_warned_about(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path / "model")
    edit_json(checkpoint / "tokenizer.json", normalizer={"type": "NFC"})
    said = io.StringIO()
    artifact, _ = exported(checkpoint, tmp_path / "store", said)
    differs = artifact.notes[-1]
    assert artifact.notes[:2] == [NFC_NOTE, NEW_CHARACTERS_NOTE]
    assert "llama.cpp's tokens differ on 1 of" in differs
    assert "cafe\u0301" in differs
    assert all(f"warning: export: gguf:F16: {note}" in said.getvalue() for note in (NFC_NOTE, differs))
    # True of every byte-level BPE: said, and no warning.
    assert f"export: gguf:F16: {NEW_CHARACTERS_NOTE}" in said.getvalue()
    assert f"warning: export: gguf:F16: {NEW_CHARACTERS_NOTE}" not in said.getvalue()
    again = io.StringIO()
    assert exported(checkpoint, tmp_path / "store", again)[0] == artifact
    assert f"warning: export: gguf:F16: {NFC_NOTE}" in again.getvalue()


def test_a_wrong_tokenizer_is_refused(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path / "model")
    artifact, out = exported(checkpoint, tmp_path / "store", io.StringIO())
    assert artifact.notes == [NEW_CHARACTERS_NOTE]
    assert with_checked_tokenizer(artifact, out, checkpoint) == artifact
    other = shutil.copytree(checkpoint, tmp_path / "other")
    byte_level_bpe(other, pre="qwen2")
    with pytest.raises(UserError, match=r"llama\.cpp's tokens differ on \d+ of") as caught:
        with_checked_tokenizer(artifact, out, other)
    assert "choose another format" in caught.value.remedy
