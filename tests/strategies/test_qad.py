"""Quantization-aware distillation, small and whole: what is exported is what training saw, and it pays."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command import Command
from safetensors.torch import load_file

from edgedistill.errors import UserError
from edgedistill.gguf.dequantize import dequantized
from edgedistill.gguf.importance import read_importance
from edgedistill.onnx.dequantize import stored
from edgedistill.quantization.options import ExportOptions
from edgedistill.records.training import QadResult
from edgedistill.runtimes.runners import load_torch
from edgedistill.strategies.fake_quant import FakeQuantizer, Rounding
from edgedistill.strategies.qad import pinned

# the tiny text's calibration part is small: more of it, for an importance matrix
SET = ("distill.qad.tokens_share=0.5", "distill.qad.learning_rate=1e-3", "data.calibration_share=0.3")
ASKED = tuple(word for one in SET for word in ("--set", one))


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Command:
    """One build of two artifacts under their rounding."""
    command = Command(tmp_path_factory.mktemp("qad"), warm=True)
    artifacts = ("--set", "export.artifacts=[gguf:Q4_0, onnx:INT4]")
    done = command("build", command.recipe(), "-t", "phone", *ASKED, *artifacts, "--json")
    assert done.returncode == 0, done.stderr
    (command.folder / "first.json").write_text(done.stdout)
    return command


def records(command: Command) -> dict[str, tuple[Path, QadResult]]:
    found = {}
    for path in (command.folder / "store" / "records" / "qad").glob("*/record.json"):
        document = json.loads(path.read_text())
        result = QadResult.model_validate(document.get("result", document))
        found[result.artifact] = (path.parent, result)
    return found


def exports(command: Command) -> dict[Path, dict]:
    """Folder → artifact record of every export in the store."""
    found = {}
    for path in (command.folder / "store" / "records" / "export").glob("*/record.json"):
        document = json.loads(path.read_text())
        found[path.parent] = document.get("result", document)
    return found


def test_the_exported_weights_are_what_training_computed_with(built: Command) -> None:
    found = records(built)
    assert set(found) == {"gguf:Q4_0", "onnx:INT4"}
    for artifact, (folder, result) in found.items():
        assert result.weights_sha256 != result.student_weights_sha256
        model = load_torch(folder / result.path)
        format_, quantization = artifact.split(":")
        importance = {}
        if result.importance_file is not None:
            means = read_importance(folder / result.importance_file).mean_squares
            importance = {f"{module}.weight": values for module, values in means.items()}
        quantizer = FakeQuantizer(model, Rounding(format_, quantization, result.tensor_types, importance))
        where = next(f for f, made in exports(built).items() if made["quantization"] == quantization)
        if format_ == "gguf":
            file = dict(dequantized(where / "model.gguf"))
        else:
            config = json.loads((folder / result.path / "config.json").read_text())
            file = {name: values for name, _, values in stored(where, config)}
        for name, values in file.items():
            assert np.array_equal(quantizer.values(name).numpy(), values), (artifact, name)


def test_the_record_names_both_students_and_the_ladder_keeps_the_float_one(built: Command) -> None:
    document = json.loads((built.folder / "first.json").read_text())
    student = document["student"]["weights_sha256"]
    for made in document["bundles"][0]["artifacts"]:
        (note,) = [n for n in made["artifact"]["notes"] if "quantization-aware" in n]
        assert student[:16] in note
    rungs = [{r["rung"]: r for r in made["retention"]["rungs"]} for made in document["bundles"][0]["artifacts"]]
    assert rungs[0]["student"]["perplexity"] == rungs[1]["student"]["perplexity"]


def test_a_second_build_finds_it_and_another_rate_does_not(built: Command) -> None:
    before = set(records(built)["gguf:Q4_0"][0].parent.iterdir())
    again = ("build", built.recipe(), "-t", "phone", "--set", "export.artifacts=[gguf:Q4_0]", "--json")
    done = built(*again, *ASKED)
    assert done.returncode == 0, done.stderr
    folder = records(built)["gguf:Q4_0"][0].parent
    assert set(folder.iterdir()) == before
    other = [word.replace("learning_rate=1e-3", "learning_rate=5e-4") for word in ASKED]
    assert other != list(ASKED)
    done = built(*again, *other)
    assert done.returncode == 0, done.stderr
    assert len(list(folder.iterdir())) == len(before) + 1
    # the student itself is the same record: what follows it is not part of its key
    assert len(list((built.folder / "store" / "records" / "student").iterdir())) == 1


def test_masters_stay_fp32_and_differ_from_what_is_stored(built: Command) -> None:
    folder, result = records(built)["gguf:Q4_0"]
    weights = load_file(folder / result.path / "model.safetensors")
    assert {t.dtype for t in weights.values()} == {torch.float32}
    quantizer = FakeQuantizer(load_torch(folder / result.path), Rounding("gguf", "Q4_0", result.tensor_types))
    name = next(n for n, kind in result.tensor_types.items() if kind == "Q4_0")
    assert not torch.equal(quantizer.values(name), weights[name])


def test_the_importance_matrix_is_the_float_students_and_goes_with_the_masters(built: Command) -> None:
    """The calibration part of the tiny text is large enough here: Q4_0's `auto` takes a matrix."""
    _, result = records(built)["gguf:Q4_0"]
    assert result.importance_file is not None
    exported = next(r for r in exports(built).values() if r["quantization"] == "Q4_0")
    assert exported["calibration"] is not None
    assert records(built)["onnx:INT4"][1].importance_file is None


def test_a_mix_that_would_be_chosen_again_is_refused() -> None:
    with pytest.raises(UserError, match="mixed_retention"):
        pinned(ExportOptions(mixed_retention=0.9))
    assert pinned(ExportOptions()).importance_matrix == "off"
