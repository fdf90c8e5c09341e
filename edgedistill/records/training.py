"""What the stages teacher, student and distill leave."""

from __future__ import annotations

from typing import Any, Literal

from edgedistill.records.base import Record
from edgedistill.records.shape import Shape


class TrainResult(Record):
    """How a training run went."""

    steps: int
    tokens: int
    seconds: float
    tokens_per_s: float
    best_step: int
    stopped_early: bool
    history: list[dict[str, float]]
    loss: str
    precision: str
    skipped_steps: list[int] = []
    micro_batch_sequences: int = 0
    ranks: int = 1


class SignalsResult(Record):
    """A cache of the teacher's signals. `path` is relative to the record; `tokens` are the packed sequences'."""

    path: str
    kind: str
    tokens: int
    bytes: int
    bytes_per_token: float


class FurtherTeacher(Record):
    """A teacher beside the first: what it is, where its weights lie, and its share before normalising."""

    name: str
    origin: Literal["folder", "hub"]
    path: str
    shape: Shape
    parameters: int
    weights_sha256: str
    tokenizer_sha256: str
    weight: float


class TeacherResult(Record):
    """The teacher: where its weights lie and what they are. `path` is a local folder."""

    origin: Literal["trained", "folder", "hub"]
    name: str
    path: str
    shape: Shape
    parameters: int
    weights_sha256: str
    tokenizer_sha256: str
    training: TrainResult | None = None
    adopted: bool = False
    weight: float = 1.0
    also: list[FurtherTeacher] = []


class StudentResult(Record):
    """A trained (or given) student: `model/` in its record's folder, as transformers saves it."""

    path: str
    start: Literal["fresh", "pretrained", "layers", "width", "both", "given"]
    start_details: dict[str, Any] = {}
    shape: Shape
    parameters: int
    weights_sha256: str
    tokenizer_sha256: str
    teacher_weights_sha256: str | None = None
    further_teachers: list[FurtherTeacher] = []
    signals: str = "none"
    training: TrainResult | None = None
    adopted: bool = False


class QadResult(Record):
    """A student trained under an artifact's rounding: its fp32 masters, which the artifact is exported from.

    `student_weights_sha256`: the float student that it started as, which stays the ladder's `student`.
    `tensor_types`: what the artifact stores of each tensor, by transformers' names. `importance_file`: the importance
    matrix that training rounded with and the export takes; None: none.
    """

    path: str
    artifact: str
    weights_sha256: str
    student_weights_sha256: str
    tokenizer_sha256: str
    tensor_types: dict[str, str]
    importance_file: str | None = None
    signals: str
    training: TrainResult
