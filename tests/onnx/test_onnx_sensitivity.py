"""Nodes that stay float: the layer that was spoilt on purpose first, and no more than what is asked needs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import CORPUS
from encoders import tiny_encoder
from transformers import AutoModel

from edgedistill.errors import UserError
from edgedistill.export.stage import write_artifact
from edgedistill.onnx.calibration import text_samples
from edgedistill.quantization.options import ExportOptions
from edgedistill.records.artifact import Artifact
from edgedistill.runtimes.graph import GraphProcess

OPTIONS = ExportOptions(
    calibration=tuple((line,) for line in CORPUS), calibration_samples=16, calibration_source="lines",
    compare_speed=False,
)  # fmt: skip
SPOILT = "encoder.layer.1.intermediate"


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with one weight a row far too large, read where its input is zero: nothing but rounding sees it."""
    folder = tiny_encoder(tmp_path_factory.mktemp("bert") / "model", "bert-model")
    model = AutoModel.from_pretrained(folder)
    layer = model.encoder.layer[1]
    with torch.no_grad():
        layer.attention.output.LayerNorm.weight[0] = layer.attention.output.LayerNorm.bias[0] = 0.0
        weight = layer.intermediate.dense.weight
        weight[:, 0] = 100 * weight.abs().max()
    model.save_pretrained(folder)
    return folder


def export(checkpoint: Path, out: Path, quantization: str, **changes: object) -> Artifact:
    return write_artifact(
        checkpoint, out, format_="onnx", quantization=quantization, context_tokens=0, name="x",
        options=dataclasses.replace(OPTIONS, **changes),
    )  # fmt: skip


@pytest.mark.parametrize(("quantization", "target"), [("INT8", 0.995), ("INT8-WEIGHTS", 0.999)])
def test_what_was_spoilt_stays_float(spoilt: Path, tmp_path: Path, quantization: str, target: float) -> None:
    made = export(spoilt, tmp_path / "mixed", quantization, mixed_retention=target)
    table = made.sensitivity
    assert table is not None and table.metric.startswith("1 - cosine") and table.source == "lines"
    assert max(table.rows, key=lambda row: row.cost).group == SPOILT
    chosen = {row.group: row.chosen for row in table.rows}
    assert chosen[SPOILT] == "FP32" and quantization in chosen.values()
    assert table.as_quantized < target <= table.reached
    assert {name for name, kind in made.overrides.items() if kind == "FP32"}
    whole = export(spoilt, tmp_path / "float", "FP32")
    assert (tmp_path / "mixed" / "model.onnx").stat().st_size < (tmp_path / "float" / "model.onnx").stat().st_size
    # The file's own retention, computed plainly.
    names = [spec.name for spec in whole.inputs]
    samples = text_samples(
        spoilt, [line for (line,) in OPTIONS.calibration or ()], names, max_tokens=64, options=OPTIONS
    )
    cosines = []
    with (
        GraphProcess(tmp_path / "mixed" / "model.onnx", threads=1) as mixed,
        GraphProcess(tmp_path / "float" / "model.onnx", threads=1) as plain,
    ):
        for batch in samples.batches():
            for a, b in zip(mixed.run(batch)["last_hidden_state"], plain.run(batch)["last_hidden_state"], strict=True):
                cosines += [x @ y / (np.linalg.norm(x) * np.linalg.norm(y)) for x, y in zip(a, b, strict=True)]
    assert np.mean(cosines) == pytest.approx(table.reached, abs=1e-5)


def test_of_a_classifier_it_is_kl_and_the_class(tmp_path: Path) -> None:
    checkpoint = tiny_encoder(tmp_path / "model", "bert")
    made = export(checkpoint, tmp_path / "out", "INT4", mixed_retention=0.999)
    table = made.sensitivity
    assert table is not None and table.metric.startswith("mean KL") and table.reached >= 0.999
    assert table.examples == table.documents >= 2
    names = {row.group for row in table.rows}
    assert {"bert.encoder.layer.0.attention", "classifier"} <= names


def test_what_names_its_type_keeps_it(spoilt: Path, tmp_path: Path) -> None:
    made = export(
        spoilt,
        tmp_path / "out",
        "INT8-WEIGHTS",
        mixed_retention=0.5,
        tensor_types=((r"layer\.0\.intermediate", "FP32"),),
    )
    assert made.sensitivity is not None
    assert not any("layer.0.intermediate" in row.group for row in made.sensitivity.rows)
    assert list(made.overrides.values()) == ["FP32"]


@pytest.mark.parametrize(
    ("kind", "quantization", "message"),
    [
        ("bert-model", "FP32", "mixed_retention with the quantization FP32"),
        ("t5", "INT8-WEIGHTS", "mixed_retention of a text2text model"),
    ],
)
def test_where_there_is_no_choice_it_is_refused(tmp_path: Path, kind: str, quantization: str, message: str) -> None:
    checkpoint = tiny_encoder(tmp_path / "model", kind)
    with pytest.raises(UserError, match=message):
        export(checkpoint, tmp_path / "out", quantization, mixed_retention=0.9)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
