"""What is compared, each with a checkpoint that is made for it: tokenizers, image processors, families, tasks."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pipelines import compare
from pipelines.family_table import CLASSIFIERS, LONGEST, OTHERS, REFUSED, WRITERS, text_checkpoint, tokenizer_for
from pipelines.image_table import IMAGES, image_checkpoint
from pipelines.tokenizer_table import TOKENIZERS

# Exports a folder into another by the real command line, for a task where it is named: exit code and standard error.
Export = Callable[[Path, Path, str], tuple[int, str]]
TOKENIZER, IMAGE, FAMILY = "tokenizer", "image processor", "family"


@dataclass(frozen=True)
class Case:
    """`made(folder)` writes the checkpoint. `refused`: what has to be said where it is right to refuse it."""

    kind: str
    name: str
    task: str
    made: Callable[[Path], None]
    family: str
    refused: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    shortest: str = compare.SHORT
    settings: dict[str, Any] = field(default_factory=dict)
    asked: bool = False  # whether the task is named, where the class's own name does not say it

    @property
    def missing(self) -> list[str]:
        """Packages that it needs and that are not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


@dataclass(frozen=True)
class Outcome:
    """`state`: equal, refused or wrong. `error`: the largest relative difference. `said`: why it is so."""

    state: str
    error: float | None = None
    inputs: tuple[str, ...] = ()
    said: str = ""


def run(case: Case, work: Path, export: Export) -> Outcome:
    """The original first; it is gone when the exported folder, under a name of its own, is opened by itself."""
    folder, out, alone = work / "model", work / "out", work / "elsewhere"
    folder.mkdir()
    case.made(folder)
    given: list[compare.Given] = []
    expected: list[compare.Arrays] = []
    if case.kind == IMAGE and not case.refused:
        given, expected = compare.original_images(folder, case.task)
    elif not case.refused:
        given, expected = compare.original_text(folder, case.task, LONGEST, case.shortest)
    code, said = export(folder, out, case.task if case.asked else "")
    if code == 2:
        lacking = [part for part in (*case.refused, "try: ") if part not in said]
        state = "wrong" if lacking or not case.refused else "refused"
        return Outcome(state, said=said if state == "wrong" else case.refused[0])
    if code:
        return Outcome("wrong", said=said[-2000:])
    if case.refused:
        return Outcome("wrong", said=f"exported, where it has to be refused: {case.refused[0]}")
    shutil.rmtree(folder)
    out.rename(alone)
    exported = (
        compare.exported_images(alone, given) if case.kind == IMAGE else compare.exported_text(alone, case.task, given)
    )
    found = compare.compare(given, expected, list(exported))
    return Outcome("wrong" if found.wrong else "equal", found.error, tuple(found.inputs), "; ".join(found.wrong))


def cases() -> Iterator[Case]:
    for name, row in TOKENIZERS.items():
        yield Case(
            TOKENIZER, name, row.task, partial(text_checkpoint, tokenizer=name), row.family, row.refused, row.needs,
            row.shortest, row.options, asked=name == "BertGenerationTokenizer",
        )  # fmt: skip
    for name, image in IMAGES.items():
        yield Case(
            IMAGE, name, image.task, partial(image_checkpoint, processor=name), image.family, image.refused,
            settings=image.settings, asked=name == "PerceiverImageProcessor",
        )  # fmt: skip
    for task, families in {
        "text-classification": CLASSIFIERS,
        "text2text": WRITERS,
        **dict.fromkeys(("token-classification", "question-answering", "fill-mask", "feature-extraction"), OTHERS),
    }.items():
        for family in families:
            if (family, task) in {(row.family, row.task) for row in TOKENIZERS.values()}:
                continue  # a tokenizer's case
            name = tokenizer_for(family)
            yield Case(
                FAMILY, f"{family}, {task}", task, partial(text_checkpoint, tokenizer=name, family=family, task=task),
                family, REFUSED.get((family, task), REFUSED.get((family, ""), ())), TOKENIZERS[name].needs,
                TOKENIZERS[name].shortest,
            )  # fmt: skip
