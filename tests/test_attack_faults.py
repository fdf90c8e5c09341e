"""The planters of faults: every one really changes its file, and what is planted opens in the runtime or is refused.

benchmarks/attack.py plants them all, and counts who stops each.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from attack import gguf_file
from attack.faults import Fault, seeded
from attack.gguf_faults import gguf_faults
from attack.onnx_faults import onnx_faults
from checkpoints import tiny

from edgedistill.errors import RuntimeCrashed, UserError
from edgedistill.gguf.quantize import export_gguf
from edgedistill.onnx.decoder import export_onnx
from edgedistill.runtimes.process import RuntimeProcess

OPENED = 12  # of each format, in the runtime, here; all of them in the benchmark


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("model") / "qwen3", "qwen3", hidden_size=256, head_dim=64)


@pytest.fixture(scope="module")
def gguf(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gguf")
    export_gguf(checkpoint, out, quantization="Q4_K_M", context_tokens=128, threads=1, name="tiny")
    return out / "model.gguf"


@pytest.fixture(scope="module")
def decoder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("onnx") / "out"
    export_onnx(
        checkpoint, out, quantization="INT4", context_tokens=128, threads=1, name="tiny", compare_logits=False
    )  # fmt: skip
    return out


def files(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in ([path] if path.is_file() else sorted(path.iterdir()))}


def planted(fault: Fault, whole: Path, work: Path) -> Path:
    """A copy with the fault in it."""
    if whole.is_dir():
        return _apply(fault, Path(shutil.copytree(whole, work / whole.name)))
    return _apply(fault, Path(shutil.copyfile(whole, work / whole.name)))


def _apply(fault: Fault, path: Path) -> Path:
    fault.apply(path, seeded(fault))
    return path


def opens(runtime: str, path: Path) -> bool:
    """Whether the runtime computes anything with it; refused or dead otherwise, and never a Python error."""
    try:
        with RuntimeProcess(runtime, path, threads=1, context_tokens=32, use_extra_bufts=False) as process:  # type: ignore[arg-type]
            return bool(process.logits(np.arange(1, 9)).size)
    except (UserError, RuntimeCrashed):
        return False


def test_the_editor_of_ggufs_changes_nothing_by_itself(gguf: Path, tmp_path: Path) -> None:
    from gguf import GGUFReader

    copy = tmp_path / "copy.gguf"
    gguf_file.write(gguf_file.read(gguf), copy)
    one, other = GGUFReader(gguf), GGUFReader(copy)
    assert list(one.fields) == list(other.fields)
    assert {k: f.contents() for k, f in one.fields.items()} == {k: f.contents() for k, f in other.fields.items()}
    for a, b in zip(one.tensors, other.tensors, strict=True):
        assert (a.name, a.tensor_type, list(a.shape)) == (b.name, b.tensor_type, list(b.shape))
        assert a.data.tobytes() == b.data.tobytes()


@pytest.mark.parametrize("kind", ["gguf", "onnx"])
def test_every_fault_changes_its_artifact_the_same_way_twice(
    kind: str, gguf: Path, decoder: Path, tmp_path: Path
) -> None:
    whole, faults = (gguf, gguf_faults(gguf)) if kind == "gguf" else (decoder, onnx_faults(decoder))
    assert len(faults) >= (100 if kind == "gguf" else 60)
    assert len({fault.kind for fault in faults}) >= 30
    before = files(whole)
    for number, fault in enumerate(faults):
        first, second = (tmp_path / f"{number}-{i}" for i in range(2))
        first.mkdir()
        after = files(planted(fault, whole, first))
        assert after != before, fault.name
        assert fault.names
        if number % 8 == 0:
            second.mkdir()
            assert files(planted(fault, whole, second)) == after, fault.name
        shutil.rmtree(first)
    assert files(whole) == before


def test_most_faults_open_in_llama_cpp(gguf: Path, tmp_path: Path) -> None:
    faults = gguf_faults(gguf)
    chosen = faults[:: len(faults) // OPENED + 1]
    opened = []
    for number, fault in enumerate(chosen):
        (tmp_path / str(number)).mkdir()
        opened.append(opens("llama.cpp", planted(fault, gguf, tmp_path / str(number))))
    assert sum(opened) >= len(chosen) * 3 // 4, [f.name for f, good in zip(chosen, opened, strict=True) if not good]


def test_most_faults_open_in_onnxruntime_genai(decoder: Path, tmp_path: Path) -> None:
    faults = onnx_faults(decoder)
    chosen = faults[:: len(faults) // OPENED + 1]
    opened = []
    for number, fault in enumerate(chosen):
        (tmp_path / str(number)).mkdir()
        opened.append(opens("onnxruntime-genai", planted(fault, decoder, tmp_path / str(number))))
    assert sum(opened) >= len(chosen) // 2, [f.name for f, good in zip(chosen, opened, strict=True) if not good]
