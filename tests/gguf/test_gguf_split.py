"""Split GGUFs: read back whole, and run in llama.cpp from the first file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from checkpoints import tiny
from gguf import GGUFReader

from edgedistill.errors import UserError
from edgedistill.gguf.dequantize import dequantized
from edgedistill.gguf.quantize import export_gguf
from edgedistill.gguf.split import split_gguf
from edgedistill.guards.gguf import split_files
from edgedistill.quantization.options import ExportOptions
from edgedistill.runtimes.process import RuntimeProcess

LIMIT = 150_000


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("split") / "model", hidden_size=128, intermediate_size=256, head_dim=32)


def export(checkpoint: Path, out: Path, quantization: str, limit: int | None) -> list[Path]:
    artifact = export_gguf(
        checkpoint, out, quantization=quantization, context_tokens=256, threads=1, name="test",
        options=ExportOptions(max_file_bytes=limit),
    )  # fmt: skip
    assert artifact.bytes == sum(file.bytes for file in artifact.files)
    assert [file.path for file in artifact.files] == sorted(path.name for path in out.iterdir())
    assert artifact.entry == artifact.files[0].path
    return [out / file.path for file in artifact.files]


@pytest.mark.parametrize("quantization", ["F16", "Q8_0"])
def test_a_split_file_holds_and_computes_the_same(checkpoint: Path, tmp_path: Path, quantization: str) -> None:
    (whole,) = export(checkpoint, tmp_path / "whole", quantization, None)
    files = export(checkpoint, tmp_path / "split", quantization, LIMIT)
    assert len(files) > 2 and all(file.stat().st_size <= LIMIT for file in files)
    assert [f.name for f in files] == [f"model-{i + 1:05d}-of-{len(files):05d}.gguf" for i in range(len(files))]

    original = GGUFReader(whole)
    parts = [GGUFReader(file) for file in files]
    tensors = [tensor for part in parts for tensor in part.tensors]
    assert [t.name for t in tensors] == [t.name for t in original.tensors]
    assert all(np.array_equal(a.data, b.data) for a, b in zip(tensors, original.tensors, strict=True))
    keys = {name: field.contents() for name, field in original.fields.items() if not name.startswith("GGUF.")}
    kept = {n: f.contents() for n, f in parts[0].fields.items() if not n.startswith(("GGUF.", "split."))}
    assert kept == keys
    for number, part in enumerate(parts):
        split = {name: field.contents() for name, field in part.fields.items() if name.startswith("split.")}
        assert split == {"split.no": number, "split.count": len(files), "split.tensors.count": len(tensors)}

    again = dict(dequantized(files[0]))
    assert all(np.array_equal(values, again.pop(name)) for name, values in dequantized(whole))
    assert not again
    tokens = np.arange(1, 40)
    rows = []
    for path in (whole, files[0]):
        with RuntimeProcess("llama.cpp", path, threads=1, context_tokens=64) as runtime:
            rows.append(runtime.logits(tokens))
    assert np.array_equal(rows[0], rows[1])


def test_metadata_may_fill_the_first_file_alone(checkpoint: Path, tmp_path: Path) -> None:
    """The first tensor, the embedding, does not fit beside the tokenizer."""
    (whole,) = export(checkpoint, tmp_path / "whole", "F16", None)
    reader = GGUFReader(whole)
    embedding = int(reader.tensors[0].n_bytes)
    files = export(checkpoint, tmp_path / "split", "F16", embedding + 1000)
    assert len(GGUFReader(files[0]).tensors) == 0
    with RuntimeProcess("llama.cpp", files[0], threads=1, context_tokens=64) as runtime:
        assert runtime.logits(np.arange(5)).shape == (5, 400)


def test_what_does_not_fit_is_refused_and_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    (whole,) = export(checkpoint, tmp_path / "whole", "F16", None)
    largest = max(int(t.n_bytes) for t in GGUFReader(whole).tensors)
    for limit, words in ((largest, "has 102,400 bytes"), (1000, "its metadata")):
        out = tmp_path / f"out{limit}"
        with pytest.raises(UserError, match=words):
            export(checkpoint, out, "F16", limit)
        assert list(out.iterdir()) == []


def test_a_full_disk_leaves_the_whole_file_alone(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (whole,) = export(checkpoint, tmp_path / "whole", "F16", None)
    before = whole.read_bytes()
    import edgedistill.gguf.split as split

    written = 0

    def full(read: object, out: object, offset: int, size: int) -> None:
        nonlocal written
        written += 1
        if written == 5:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(split, "_copy", full)
    with pytest.raises(UserError, match="No space left"):
        split_gguf(whole, LIMIT)
    assert [path.name for path in whole.parent.iterdir()] == ["model.gguf"]
    assert whole.read_bytes() == before


def test_a_missing_part_is_named(checkpoint: Path, tmp_path: Path) -> None:
    files = export(checkpoint, tmp_path / "split", "F16", LIMIT)
    assert split_files(files[0]) == files
    with pytest.raises(UserError, match="not the first file"):
        split_files(files[1])
    files[1].unlink()
    with pytest.raises(UserError, match=files[1].name):
        list(dequantized(files[0]))
