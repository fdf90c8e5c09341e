"""Whether a recipe's training fits a machine's memory, and which settings would. Everything here is `derived`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from edgedistill.config.recipe import Recipe, Training
from edgedistill.fit.training_memory import GENERAL_BLOCKS, PLAIN_BLOCKS, Prediction, Signals, Teaching, predict
from edgedistill.records.shape import Shape

# What stands after the imports of a training process (measured: 364 MB, 420 MB with peft), and its text.
PROCESS_BYTES = 450_000_000


@dataclass(frozen=True)
class Run:
    """A training run of a recipe: what it is called, where its settings lie in the recipe, and its peak by recipe."""

    what: str
    section: str
    predict: Callable[[Recipe], Prediction]
    settings: Callable[[Recipe], Training]

    def needs(self, recipe: Recipe) -> int:
        """The whole process's bytes."""
        return PROCESS_BYTES + self.predict(recipe).bytes


@dataclass(frozen=True)
class Proposal:
    """Settings that fit: the words after --set, and the whole process's predicted bytes."""

    words: tuple[str, ...]
    bytes: int


def distillation(student: Shape, teacher: Shape, further: Sequence[Shape] = ()) -> Run:
    return Run(
        "distillation", "distill", lambda recipe: predict_distillation(recipe, student, teacher, further),
        lambda recipe: recipe.distill,
    )  # fmt: skip


def teacher_training(teacher: Shape) -> Run:
    return Run(
        "the teacher's training", "teacher.train", lambda recipe: predict(teacher, recipe.teacher.train),
        lambda recipe: recipe.teacher.train,
    )  # fmt: skip


def predict_distillation(
    recipe: Recipe, student: Shape, teacher: Shape, further: Sequence[Shape] = (), *, device: str = "cpu"
) -> Prediction:
    """The distillation's peak as a recipe asks for it; teacher_signals auto is taken as live, which needs more."""
    ask = recipe.distill
    signals: Signals = "cached" if ask.teacher_signals == "cached" else "live"
    teaching = Teaching(
        teacher,
        signals=signals,
        precision=teacher_precision(recipe, device),
        stored="bf16" if recipe.teacher.model is not None else "fp32",
        kind=ask.cache.kind,
        offloaded=recipe.teacher.placement == "offload",
        further=tuple(further),
    )
    return predict(
        student, ask, teaching if recipe.distill.needs_teacher else None, lora=ask.lora, blocks=blocks_of(recipe),
        device=device,
    )  # fmt: skip


def blocks_of(recipe: Recipe) -> int:
    """How many float32 buffers of a block of logits the recipe's mix of losses needs."""
    return GENERAL_BLOCKS if recipe.distill.general or recipe.distill.temperature != 1.0 else PLAIN_BLOCKS


def teacher_precision(recipe: Recipe, device: str) -> str:
    """As `distill.teacher_model.precision_of`."""
    asked = recipe.teacher.precision
    return asked if asked != "auto" else "bf16" if device == "cuda" else "fp32"


def propose(run: Run, recipe: Recipe, limit: int) -> Proposal | None:
    """The settings nearest to those asked for with which `run` needs at most `limit` bytes; None where none fit.

    In turn, each on top of those before it: the largest micro-batch that fits; activation checkpointing; 8-bit AdamW;
    a cached teacher instead of a live one; a quantized teacher. The batch, and so the step, stays what it is.
    """
    for changed, words in _relaxed(run, recipe):
        settings = run.settings(changed)
        asked = min(settings.batch_sequences, settings.micro_batch_sequences or settings.batch_sequences)
        for micro in range(asked, 0, -1):
            smaller = _set(changed, run.section, micro_batch_sequences=micro) if micro < asked else changed
            needed = run.needs(smaller)
            if needed <= limit:
                added = (f"{run.section}.micro_batch_sequences={micro}",) if micro < asked else ()
                return Proposal(words + added, needed)
    return None


def _relaxed(run: Run, recipe: Recipe) -> Iterator[tuple[Recipe, tuple[str, ...]]]:
    """The recipe, then with one more setting changed each time."""
    words: tuple[str, ...] = ()
    yield recipe, words
    if not run.settings(recipe).activation_checkpointing:
        recipe = _set(recipe, run.section, activation_checkpointing=True)
        words += (f"{run.section}.activation_checkpointing=true",)
        yield recipe, words
    if run.settings(recipe).optimizer != "adamw8bit":
        recipe = _set(recipe, run.section, optimizer="adamw8bit")
        words += (f"{run.section}.optimizer=adamw8bit",)
        yield recipe, words
    if run.section != "distill" or not recipe.distill.needs_teacher:
        return
    ways = [(recipe, words)]
    if recipe.distill.teacher_signals != "cached":
        # samples serve forward KL alone; other losses need exact states, of several teachers their mixed logits
        exact = "dense" if recipe.teacher.also else "hidden"
        kind = exact if recipe.distill.general else "sampled"
        cache = recipe.distill.cache.model_copy(update={"kind": kind})
        words += ("distill.teacher_signals=cached",)
        words += () if kind == recipe.distill.cache.kind else (f"distill.cache.kind={kind}",)
        recipe = _set(recipe, "distill", teacher_signals="cached", cache=cache)
        yield recipe, words
        ways.append((recipe, words))
    if recipe.teacher.placement == "auto":
        order = ("fp32", "bf16", "int8", "nf4")
        for precision in order[order.index(teacher_precision(recipe, "cpu")) + 1 :]:
            # building a cache may need more than a live teacher does, so that both are tried
            for way, named in reversed(ways):
                quantized = way.teacher.model_copy(update={"precision": precision})
                yield way.model_copy(update={"teacher": quantized}), (*named, f"teacher.precision={precision}")


def _set(recipe: Recipe, section: str, **changes: Any) -> Recipe:
    if section == "distill":
        return recipe.model_copy(update={"distill": recipe.distill.model_copy(update=changes)})
    trained = recipe.teacher.train.model_copy(update=changes)
    return recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"train": trained})})
