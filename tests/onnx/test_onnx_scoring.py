"""What quantizing costs, by what an output holds: a softmax of one score is no measure, nor is the first of several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import CORPUS
from encoders import tiny_encoder
from numpy.typing import NDArray

from edgedistill.export.stage import write_artifact
from edgedistill.onnx.scoring import meanings_of, rows_of, score
from edgedistill.onnx.tasks import CLASSES, DERIVED, LABELS, PLACES, SCORES, VECTORS, _meanings
from edgedistill.quantization.options import ExportOptions
from edgedistill.records.artifact import TensorSpec

RNG = np.random.default_rng(0)
MASK = np.array([[1, 1, 1, 0], [1, 1, 1, 1]])


def retention(meaning: str, reference: NDArray[Any], found: NDArray[Any], mask: NDArray[Any] | None = None) -> float:
    batch = {} if mask is None else {"attention_mask": mask}
    one, other = ({"out": rows_of(values, batch, meaning)} for values in (reference, found))
    return score({"out": meaning}, [one], [other], [len(reference)]).retention


def test_scores_are_held_to_their_own_spread() -> None:
    scores = RNG.standard_normal((500, 1)) * 0.01 + 3
    assert retention(SCORES, scores, scores) == 1.0
    noise = RNG.standard_normal((500, 1)) * 0.001
    assert retention(SCORES, scores, scores + noise) == pytest.approx(0.99, abs=0.003)
    # Off by 97 % of the spread: nearly nothing is kept, and of a constant nothing at all.
    assert retention(SCORES, scores, scores + 0.97 * 0.01) == pytest.approx(1 - 0.97**2, abs=0.1)
    assert retention(SCORES, scores, np.full_like(scores, scores.mean())) == pytest.approx(0.0, abs=1e-9)
    # Two numbers of another size each count by their own spread.
    two = np.concatenate([scores, 1000 * RNG.standard_normal((500, 1))], axis=1)
    assert retention(SCORES, two, two + np.array([0.01, 0.0])) == pytest.approx(0.5, abs=0.1)
    assert retention(SCORES, np.full((5, 1), 2.0), np.full((5, 1), 2.0)) == 1.0


def test_labels_are_decided_one_by_one() -> None:
    logits = np.array([[8.0, 3.0, -4.0]])
    # The largest stays the largest, and a label is lost.
    found = np.array([[8.0, -3.0, -4.0]])
    assert retention(CLASSES, logits, found) > 0.9 and retention(LABELS, logits, found) < 0.1
    assert retention(LABELS, logits, logits) == 1.0
    # All labels shifted: a softmax does not see it.
    assert retention(CLASSES, logits, logits - 4) == 1.0 and retention(LABELS, logits, logits - 4) < 0.4


def test_padding_does_not_count() -> None:
    states = RNG.standard_normal((2, 4, 6))
    spoilt = states.copy()
    spoilt[0, 3] = -spoilt[0, 3]
    for meaning in (VECTORS, CLASSES):
        assert retention(meaning, states, spoilt, MASK) == pytest.approx(1.0)
        assert retention(meaning, states, spoilt) < 0.99
    assert len(rows_of(states, {"attention_mask": MASK}, VECTORS).owner) == 7
    places = RNG.standard_normal((2, 4))
    moved = places.copy()
    moved[0, 3] = 50.0
    assert retention(PLACES, places, moved, MASK) == 1.0 and retention(PLACES, places, moved) < 0.1


def test_the_worst_output_counts_and_costs_add_up() -> None:
    start, end = RNG.standard_normal((3, 5)), RNG.standard_normal((3, 5))
    meanings = {"start_logits": PLACES, "end_logits": PLACES}

    def scored(moved: NDArray[Any]) -> Any:
        parts = [
            {"start_logits": rows_of(start, {}, PLACES), "end_logits": rows_of(e, {}, PLACES)} for e in (end, moved)
        ]
        return score(meanings, parts[:1], parts[1:], [3])

    assert scored(end).retention == 1.0 and scored(end).cost.mean == 0.0
    assert scored(-end).retention < 0.5 and scored(-end).cost.mean > 0.5


def test_what_outputs_hold_is_told_by_task_and_config() -> None:
    def of(task: str, **config: Any) -> dict[str, str]:
        return _meanings(task, type("Config", (), config)())

    assert of("text-classification", num_labels=1) == {"logits": SCORES}
    assert of("text-classification", num_labels=3, problem_type="regression") == {"logits": SCORES}
    assert of("image-classification", num_labels=3, problem_type="multi_label_classification") == {"logits": LABELS}
    assert of("token-classification", num_labels=3) == {"logits": CLASSES} == of("fill-mask")
    assert of("question-answering") == {"start_logits": PLACES, "end_logits": PLACES}
    assert of("embedding") == {"sentence_embedding": VECTORS}
    widths = {"logits": 5, "value": 1, "states": 8, "scores": 1}
    specs = [TensorSpec(name=name, dtype="float", shape=["batch", width]) for name, width in widths.items()]
    found = meanings_of(specs, {"scores": DERIVED})
    assert found == {"logits": CLASSES, "value": SCORES, "states": VECTORS}


def test_the_loss_of_a_regression_is_seen(tmp_path: Path) -> None:
    checkpoint = tiny_encoder(tmp_path / "model", "bert", head={"num_labels": 1, "problem_type": "regression"})
    options = ExportOptions(
        calibration=tuple((line,) for line in CORPUS), calibration_samples=16, calibration_source="lines",
        compare_speed=False, mixed_retention=0.9999,
    )  # fmt: skip
    made = write_artifact(
        checkpoint, tmp_path / "out", format_="onnx", quantization="INT4", context_tokens=0, name="x", options=options
    )
    table = made.sensitivity
    assert table is not None and "variance" in table.metric
    assert table.as_quantized < 0.9999 <= table.reached and max(row.cost for row in table.rows) > 1e-4
    assert json.loads((checkpoint / "config.json").read_text())["problem_type"] == "regression"
