"""The text that every rung scores, and its scores token by token.

All rungs walk the windows together, so that no logits are kept.

Legend: N scored tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch  # noqa: TID253  this module is imported by verification alone
from numpy.typing import NDArray
from torch import Tensor  # noqa: TID253

from edgedistill.config.recipe import Verify
from edgedistill.errors import UserError
from edgedistill.models.folder import kept_tokens
from edgedistill.progress import Progress
from edgedistill.records.retention import RungName
from edgedistill.records.training import StudentResult, TeacherResult
from edgedistill.runtimes.runners import Scorer
from edgedistill.statistics import ByUnit, by_unit
from edgedistill.strict import shown
from edgedistill.tasks.causal_lm import TextTokenizer, Window, encode_blocks, groups, scoring_windows
from edgedistill.tasks.metrics import PairScores, TokenScores
from edgedistill.verify.near_copies import units_of

RUNGS: tuple[RungName, ...] = ("teacher", "student", "quantized", "shipped")
NEIGHBOURS: tuple[tuple[RungName, RungName], ...] = (("student", "quantized"), ("quantized", "shipped"))
TRACED_TOKENS = 64  # of a window, where a runtime's tensors are compared with torch's


@dataclass(frozen=True)
class Text:
    """What is scored: windows of token ids, the unit of each document, and what of the vocabulary counts.

    `vocab` tokens are compared; `logits` is how many the teacher or the student has for a token, at most.

    `unit_of`: document → the unit that intervals resample, from 0; near copies share one. `duplicates`: how many
    documents are no unit of their own.
    """

    windows: list[Window]
    unit_of: dict[int, int]
    duplicates: int
    bos: bool
    vocab: int
    logits: int
    teacher_tokens: int
    numbering: _Numbering | None


def text_of(teacher: TeacherResult, student: StudentResult, held_out: list[list[str]], settings: Verify) -> Text:
    """`held_out` is blocks of documents; one that is given again is no second unit. UserError for fewer than two."""
    kept = kept_tokens(Path(teacher.path), Path(student.path))
    tokenizer = TextTokenizer.load(Path((teacher if kept is None else student).path))
    once = [list(block) for block in dict.fromkeys(tuple(block) for block in held_out)]
    documents = encode_blocks(tokenizer, once)
    if kept is None:
        _require_same_cuts(tokenizer, Path(student.path), once)
    numbering = None if kept is None else _numbering(teacher, student, np.array(kept, dtype=np.int64), once, documents)
    windows = scoring_windows(
        documents, context=settings.context_tokens, stride=settings.stride_tokens, max_tokens=settings.max_tokens
    )
    used = sorted({window.document for window in windows})
    unit_of = dict(zip(used, units_of([documents[number] for number in used]), strict=True))
    units = len(set(unit_of.values()))
    duplicates = len(held_out) - len(once) + len(used) - units
    if units < 2:
        repeated = f" ({duplicates} more have a text that stands there already)" if duplicates else ""
        raise UserError(
            f"the held-out part has {units} document(s) to score{repeated}",
            "give more held-out text: intervals need two",
        )
    return Text(
        windows=windows,
        unit_of=unit_of,
        duplicates=duplicates,
        bos=tokenizer.bos is not None,
        vocab=min(tokenizer.vocab, teacher.shape.vocab_size, student.shape.vocab_size),
        logits=max(teacher.shape.vocab_size, student.shape.vocab_size),
        teacher_tokens=tokenizer.vocab if numbering is None else numbering.tokens,
        numbering=numbering,
    )


def _require_same_cuts(teachers: TextTokenizer, student: Path, held_out: list[list[str]]) -> None:
    """The student's tokenizer, with which the artifact ships, cuts the text as the teacher's, whose tokens are scored.

    That both know the same tokens does not say so: merges or normalizer may differ. Raises UserError.
    """
    own = TextTokenizer.load(student)
    for number, block in enumerate(held_out):
        cut, wanted = (side.backend.encode_batch(block, add_special_tokens=False) for side in (own, teachers))
        for text, ours, theirs in zip(block, cut, wanted, strict=True):
            if ours.ids != theirs.ids:
                at = next((i for i, (a, b) in enumerate(zip(ours.ids, theirs.ids, strict=False)) if a != b), 0)
                raise UserError(
                    f"block {number} of the held-out text ({shown(text[:60])}) has other tokens in the student's"
                    f" tokenizer than in the teacher's, first {ours.ids[at : at + 4]} and {theirs.ids[at : at + 4]} at"
                    f" {at}, though both know the same tokens: merges, normalizer or pre-tokenizer differ",
                    "verify against the teacher whose tokenizer.json the student has",
                )


@dataclass(frozen=True)
class Scores:
    """Per scored token, in the order of scoring. `pairs`: KL(above ‖ below) and whether the likeliest tokens agree."""

    rungs: dict[RungName, TokenScores]
    pairs: dict[tuple[RungName, RungName], PairScores]
    targets: NDArray[np.int64]
    document: NDArray[np.int64]

    def by_document(self, values: Sequence[NDArray[np.generic]]) -> ByUnit:
        return by_unit(np.concatenate(values), self.document)

    def loss(self, name: RungName) -> ByUnit:
        return self.by_document(self.rungs[name].nll)


def score(text: Text, scorers: Mapping[RungName, Scorer], progress: Progress) -> Scores:
    scores = {name: TokenScores() for name in RUNGS}
    pairs = {pair: PairScores() for pair in NEIGHBOURS}
    targets_seen: list[NDArray[np.int64]] = []
    owner: list[NDArray[np.int64]] = []
    total, done = sum(window.scored for window in text.windows), 0
    for group in groups(text.windows, text.logits):
        ids = np.stack([w.ids for w in group]).astype(np.int64)
        keep = torch.from_numpy(np.concatenate([np.arange(ids.shape[1] - 1) >= window.first for window in group]))
        targets = torch.from_numpy(ids[:, 1:].reshape(-1))[keep]
        teacher_log_p, choice = _teacher(text, scorers["teacher"], ids, keep, targets, scores["teacher"])
        above: Tensor | None = None
        for name in RUNGS[1:]:
            logits = scorers[name].logits(ids)[:, :-1].flatten(0, 1)[keep]
            scores[name].add(logits, teacher_log_p, targets, choice)
            if above is not None:
                pairs[RUNGS[RUNGS.index(name) - 1], name].add(above, logits)
            above = logits
        targets_seen.append(targets.numpy())
        owner.extend(np.full(w.scored, text.unit_of[w.document], dtype=np.int64) for w in group)
        done += sum(w.scored for w in group)
        progress.step("verify", done, total)
    return Scores(scores, pairs, np.concatenate(targets_seen), np.concatenate(owner))


def _teacher(
    text: Text, scorer: Scorer, ids: NDArray[np.int64], keep: Tensor, targets: Tensor, scores: TokenScores
) -> tuple[Tensor, Tensor | None]:
    """The teacher's log-probabilities [N, V] of the student's tokens; its likeliest ones where trimming hides them."""
    numbering = text.numbering
    own_ids = ids if numbering is None else numbering.kept[ids]
    reference = scorer.logits(own_ids)[:, :-1].flatten(0, 1)[keep]
    if numbering is not None:
        reference = reference[:, torch.from_numpy(numbering.order)]
    log_p = torch.log_softmax(reference[:, : text.vocab].float(), dim=-1)
    choice = None if numbering is None else reference[:, : numbering.tokens].argmax(-1)
    scores.add(reference, log_p, targets, choice)
    return log_p, choice


@dataclass(frozen=True)
class _Numbering:
    """A trimmed student's tokens among its teacher's.

    `kept`: the teacher's id of each of the student's; `order`: all of the teacher's rows, those first, then its other
    tokens, then padding: its logits in that order begin with the student's numbering. `tokens`: how many it has.
    """

    kept: NDArray[np.int64]
    order: NDArray[np.int64]
    tokens: int


def _numbering(
    teacher: TeacherResult,
    student: StudentResult,
    kept: NDArray[np.int64],
    held_out: list[list[str]],
    documents: list[NDArray[np.int32]],
) -> _Numbering:
    """`documents` are the held-out blocks in the student's ids.

    Raises UserError where the teacher's tokenizer cuts them otherwise: scores of tokens would not pair up.
    """
    tokenizer = TextTokenizer.load(Path(teacher.path))
    for number, (own, ids) in enumerate(zip(encode_blocks(tokenizer, held_out), documents, strict=True)):
        if len(own) != len(ids) or (kept[ids] != own).any():
            raise UserError(
                f"block {number} of the held-out text ({held_out[number][0][:60]!r}) has other tokens in the student's"
                f" trimmed vocabulary of {len(kept):,} than in the teacher's: their scores cannot be paired",
                "verify on the text that the vocabulary was trimmed to, or distil with this text as --eval-data",
            )
    others = np.setdiff1d(np.arange(teacher.shape.vocab_size), kept)
    return _Numbering(kept=kept, order=np.concatenate([kept, others]), tokens=tokenizer.vocab)


def some_ids(text: Text, context_tokens: int) -> NDArray[np.int64]:
    """The longest window's beginning: what is traced layer by layer."""
    longest = max(text.windows, key=lambda window: len(window.ids))
    return longest.ids[: min(TRACED_TOKENS, context_tokens)].astype(np.int64)


def windows_sha256(windows: list[Window]) -> str:
    digest = hashlib.sha256()
    for window in windows:
        digest.update(np.array([window.document, window.first, len(window.ids)], dtype="<i8").tobytes())
        digest.update(window.ids.astype("<i4").tobytes())
    return digest.hexdigest()
