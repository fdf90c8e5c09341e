"""What the gate is given may be other than it says: tokenizers, documents, artifacts that change meanwhile, caches."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attack.faults import seeded
from attack.onnx_faults import onnx_faults
from checkpoints import copy
from command import tiny_text
from gate_models import resealed, trained
from test_gate import Bench

from edgedistill.config.targets import load_target
from edgedistill.errors import UserError
from edgedistill.stages import bench as measure_speed
from edgedistill.verify import ladder
from edgedistill.verify.gate import failures
from edgedistill.verify.near_copies import RUN_TOKENS, units_of


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("models")
    trained(folder / "a")
    (folder / "text.txt").write_text(tiny_text(24, seed=2))
    return Bench(folder)


# ---- tokenizers


def _reversed_merges(tree: dict[str, Any]) -> None:
    tree["model"]["merges"].reverse()


def _other_normalizer(tree: dict[str, Any]) -> None:
    tree["normalizer"] = {"type": "Replace", "pattern": {"String": "dog"}, "content": "cat"}


@pytest.mark.parametrize("change", [_reversed_merges, _other_normalizer])
def test_a_student_that_cuts_text_otherwise_is_not_measured_on_its_teachers_tokens(
    bench: Bench, tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    """The same vocabulary, the same weights: retention would be 1.000, and the artifact reads other tokens."""
    copy(bench.folder / "a", tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match="has other tokens in the student's tokenizer"):
        bench.verify(bench.artifact("a", "gguf:F16"), tmp_path / "other", "a")


# ---- documents


def _documents(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


STORY = tiny_text(6, seed=5).replace("\n\n", " ")
COPIES = {
    "a number in front": [f"{number} {STORY[:600]}" for number in range(30)],
    "beginnings": [STORY[: 300 + 20 * number] for number in range(30)],
    "an ending of its own": [f"{STORY[:600]} {text}" for text in tiny_text(30, seed=6).split("\n\n")],
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_of_one_document_are_one(bench: Bench, tmp_path: Path, how: str) -> None:
    data = _documents(tmp_path / "copies.jsonl", COPIES[how])
    with pytest.raises(UserError, match=r"has 1 document.* \(29 more have a text that stands there already\)"):
        bench.verify(bench.artifact("a", "gguf:F16"), "a", data=data, max_tokens=100_000)


def test_documents_beside_copies_count_each(bench: Bench, tmp_path: Path) -> None:
    texts = [*COPIES["beginnings"], *tiny_text(8, seed=7).split("\n\n")]
    found = bench.verify(
        bench.artifact("a", "gguf:F16"), "a", data=_documents(tmp_path / "some.jsonl", texts), max_tokens=100_000
    )
    assert (found.documents, found.duplicate_documents) == (9, 29)
    assert found.effective_documents < 5
    assert found.gate.verdict == "too few documents to tell"


def test_near_copies_are_those_that_share_half_of_their_runs() -> None:
    rng = np.random.default_rng(0)
    one, other, licence = (rng.integers(0, 1000, 200).astype(np.int32) for _ in range(3))
    short = one[: RUN_TOKENS - 1]
    head = licence[:80]
    documents = [one, other, one[50:], np.concatenate([head, one[:0], rng.integers(0, 1000, 200).astype(np.int32)]),
                 np.concatenate([head, rng.integers(0, 1000, 200).astype(np.int32)]), short, short]  # fmt: skip
    assert units_of(documents) == [0, 1, 0, 2, 3, 4, 5]
    chain = [np.arange(start, start + 100, dtype=np.int32) for start in range(0, 400, 40)]
    assert set(units_of(chain)) == {0}  # each is a near copy of the next


# ---- what changes while it is measured


def _in_place(model: Path) -> None:
    data = model.read_bytes()
    model.write_bytes(data[:-4096] + bytes(4096))
    model.write_bytes(data)


def _aside_and_back(model: Path) -> None:
    aside = model.with_name("aside")
    model.rename(aside)
    shutil.copyfile(aside, model)
    model.unlink()
    aside.rename(model)


def _for_good(model: Path) -> None:
    before = model.stat()
    with model.open("r+b") as file:
        file.seek(-4096, os.SEEK_END)
        file.write(bytes(4096))
    os.utime(model, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", [_in_place, _aside_and_back, _for_good])
def test_an_artifact_that_changes_while_it_is_verified_has_no_record(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    folder = tmp_path / "artifact"
    shutil.copytree(bench.artifact("a", "gguf:Q8_0"), folder)
    real = ladder.climb

    def climb(*arguments: Any, **named: Any) -> Any:
        found = real(*arguments, **named)
        change(folder / "model.gguf")
        return found

    monkeypatch.setattr(ladder, "climb", climb)
    # text of its own: nothing of another test's is reused
    data = tmp_path / "text.txt"
    data.write_text(tiny_text(24, seed={"_in_place": 11, "_aside_and_back": 12}.get(change.__name__, 13)))
    with pytest.raises(UserError, match="somebody wrote to it while it was used"):
        bench.verify(folder, "a", data=data)
    monkeypatch.undo()
    if change is not _for_good:
        assert bench.verify(folder, "a", data=data).gate.verdict == "passed"


def test_an_artifact_that_changes_while_it_is_benchmarked_has_no_figures(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgedistill.bench import measure
    from edgedistill.config.recipe import Recipe

    folder = tmp_path / "artifact"
    shutil.copytree(bench.artifact("a", "gguf:Q8_0"), folder)

    class Other(measure.RuntimeProcess):
        def close(self) -> None:
            super().close()
            _in_place(folder / "model.gguf")

    monkeypatch.setattr(measure, "RuntimeProcess", Other)
    settings = {"prompt_tokens": 8, "new_tokens": 4, "warmup": 0, "repeats": 1, "threads": 1}
    recipe = Recipe()
    recipe = recipe.model_copy(update={"bench": recipe.bench.model_copy(update=settings)})
    with pytest.raises(UserError, match="somebody wrote to it while it was used"):
        measure_speed(folder, load_target("jetson"), recipe=recipe, store=bench.store)


def test_stop_tokens_that_changed_since_are_held_to_the_artifact_again(bench: Bench, tmp_path: Path) -> None:
    """The student's generation_config.json is no part of its weights or tokenizer, and of the gate's key."""
    copy(bench.folder / "a", tmp_path / "student")
    artifact = bench.artifact("a", "gguf:Q8_0")
    assert bench.verify(artifact, tmp_path / "student").gate.verdict == "passed"
    path = tmp_path / "student" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [0, 70]}))
    again = bench.verify(artifact, tmp_path / "student")
    assert again.gate.verdict == "failed"
    assert "70" in failures(again.gate)[0]


# ---- caches


def test_a_cache_that_goes_wrong_fails_and_is_named(bench: Bench, tmp_path: Path) -> None:
    """No run of a whole text shows it: tokens decoded one by one do."""
    whole = bench.artifact("a", "onnx:FP32")
    faults = [fault for fault in onnx_faults(whole) if fault.kind == "cache"]
    assert len(faults) == 4
    for number, fault in enumerate(faults):
        folder = shutil.copytree(whole, tmp_path / str(number))
        fault.apply(folder, seeded(fault))
        found = bench.verify(resealed(folder), "a")
        assert found.gate.verdict == "failed", fault.name
        assert "present." in failures(found.gate)[0], failures(found.gate)
