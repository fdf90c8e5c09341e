"""What a build will do with the text: what is asked first of a plan.

Derived from the recipe and the text that was read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgedistill.config.recipe import Recipe, Training
from edgedistill.records.base import Count, Record

if TYPE_CHECKING:
    from edgedistill.data.prepare import Texts


class Asked(Record):
    """`documents`: None where the text is read when it is split. Steps of several epochs are about so many: how many
    tokens a document has is known of a sample."""

    source: str
    documents: Count | None
    training_tokens: Count | None
    teacher_steps: Count | None
    student_steps: Count | None
    teacher_step_tokens: Count
    student_step_tokens: Count
    min_retention: float


def asked_of(recipe: Recipe, texts: Texts, tokens_a_byte: float) -> Asked:
    """`tokens_a_byte`: of the teacher's tokenizer on a sample."""
    documents = None if texts.documents is None else texts.documents.texts
    tokens = None
    if documents is not None:
        held = 0.0 if texts.held_out is not None else recipe.data.eval_share
        trained_on = max(0.0, 1.0 - held - recipe.data.calibration_share)
        tokens = round(sum(len(text.encode()) for text in documents) * trained_on * tokens_a_byte)
    share = recipe.distill.documents_share
    return Asked(
        source=recipe.data.source,
        documents=None if documents is None else len(documents),
        training_tokens=tokens,
        teacher_steps=None if recipe.teacher.model is not None else _steps(recipe.teacher.train, tokens),
        student_steps=_steps(recipe.distill, None if tokens is None else round(tokens * share)),
        teacher_step_tokens=_step_tokens(recipe.teacher.train),
        student_step_tokens=_step_tokens(recipe.distill),
        min_retention=recipe.verify.min_retention,
    )


def _steps(settings: Training, tokens: int | None) -> int | None:
    """Optimizer steps; None where only the text tells."""
    asked = settings.tokens if settings.tokens is not None else None if tokens is None else settings.epochs * tokens
    return None if asked is None else max(1, round(asked / _step_tokens(settings)))


def _step_tokens(settings: Training) -> int:
    return settings.batch_sequences * settings.context_tokens


def asked_rows(asked: Asked) -> list[tuple[str, str, str, str]]:
    """what, value, basis, from."""
    known = "read when it is split" if asked.documents is None else f"{asked.documents:,} documents"
    rows = [("text", asked.source, "", known)]
    if asked.training_tokens is not None:
        rows.append(("training part", f"about {asked.training_tokens:,} tokens", "derived", "tokens of a sample"))
    if asked.teacher_steps is not None:
        rows.append(_step_row("teacher", f"{asked.teacher_steps:,} steps", asked.teacher_step_tokens))
    steps = "known when the text is read" if asked.student_steps is None else f"{asked.student_steps:,} steps"
    rows.append(_step_row("student", steps, asked.student_step_tokens))
    least = f"retention at least {asked.min_retention:g}"
    rows.append(("gate", least, "", "the low end of its interval (verify.min_retention)"))
    return rows


def _step_row(who: str, steps: str, tokens: int) -> tuple[str, str, str, str]:
    return f"{who}'s training", steps, "derived", f"{tokens:,} tokens a step"
