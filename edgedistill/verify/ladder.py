"""The retention ladder: teacher → student → quantized → shipped, on the same tokens.

    teacher     the original, torch fp32
    student     the trained weights, torch fp32
    quantized   the artifact's stored weights, dequantized into the torch model
    shipped     the artifact's bytes in the runtime that will run them

All rungs walk the windows together, so that no logits are kept; intervals are paired bootstraps over
documents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch  # noqa: TID253  this module is imported by verification alone
from numpy.typing import NDArray

from edgedistill import machine
from edgedistill.errors import UserError
from edgedistill.models import kept_tokens
from edgedistill.progress import QUIET, Progress
from edgedistill.recipe import Verify
from edgedistill.records import (
    Agreement,
    Artifact,
    Gate,
    Retention,
    Rung,
    RungName,
    Scored,
    StudentResult,
    TeacherResult,
    TokenizerCheck,
)
from edgedistill.runtimes.child import RuntimeName, RuntimeProcess
from edgedistill.store import Store
from edgedistill.strict import read_json
from edgedistill.tasks.causal_lm import TextTokenizer, Window, encode_blocks, scoring_windows, stride_of
from edgedistill.verification_memory import GROUP_TOKENS
from edgedistill.verify.metrics import (
    Summary,
    TokenScores,
    document_draws,
    interval,
    mean_over_tokens,
    p99_over_tokens,
    perplexity_of,
)
from edgedistill.verify.runners import ArtifactScorer, Scorer, TorchScorer, load_torch, with_weights
from edgedistill.verify.tokenizer_check import check_tokenizer

RUNGS: tuple[RungName, ...] = ("teacher", "student", "quantized", "shipped")


@dataclass(frozen=True)
class Subject:
    """What is verified: an artifact, the model it was made of, and the teacher that both are held to."""

    artifact: Artifact
    folder: Path
    student: StudentResult
    teacher: TeacherResult


def climb(
    subject: Subject,
    *,
    held_out: list[list[str]],
    settings: Verify,
    seed: int,
    threads: int,
    store: Store,
    task: str = "causal-lm",
    progress: Progress = QUIET,
) -> Retention:
    """Score every rung on `held_out` and compare the interval's lower end with the gate.

    `held_out` is blocks of documents; a block is what the intervals resample.
    Raises UserError where the tokenizers differ or the text is too short; RuntimeCrashed where the
    artifact's runtime dies.
    """
    kept = kept_tokens(Path(subject.teacher.path), Path(subject.student.path))
    tokenizer = TextTokenizer.load(Path((subject.teacher if kept is None else subject.student).path))
    documents = encode_blocks(tokenizer, held_out)
    numbering = None if kept is None else _numbering(subject, np.array(kept, dtype=np.int64), held_out, documents)
    windows = scoring_windows(
        documents, context=settings.context_tokens, stride=settings.stride_tokens, max_tokens=settings.max_tokens
    )
    used = sorted({window.document for window in windows})
    if len(used) < 2:
        raise UserError(
            f"the held-out part has {len(used)} document(s) to score", "give more held-out text: intervals need two"
        )
    vocab = min(tokenizer.vocab, subject.teacher.shape.vocab_size, subject.student.shape.vocab_size)
    runtime_options: dict[str, Any] = {}
    with ExitStack() as stack:
        check = _check_tokenizer(subject, threads, store, stack)
        process = stack.enter_context(
            RuntimeProcess(
                _scoring_runtime(subject.artifact),
                subject.folder / subject.artifact.entry,
                threads=threads,
                context_tokens=settings.context_tokens,
                store=store,
            )
        )
        runtime_options = process.info["options"]
        scorers: dict[RungName, Scorer] = {
            "teacher": TorchScorer(load_torch(Path(subject.teacher.path))),
            "student": TorchScorer(load_torch(Path(subject.student.path))),
            "quantized": TorchScorer(with_weights(Path(subject.student.path), stored_weights(subject))),
            "shipped": ArtifactScorer(process),
        }
        scores = {name: TokenScores() for name in RUNGS}
        owner: list[NDArray[np.int64]] = []
        total = sum(w.scored for w in windows)
        done = 0
        for group in groups(windows):
            ids = np.stack([w.ids for w in group]).astype(np.int64)
            keep = torch.from_numpy(np.concatenate([np.arange(ids.shape[1] - 1) >= window.first for window in group]))
            targets = torch.from_numpy(ids[:, 1:].reshape(-1))[keep]
            own_ids = ids if numbering is None else numbering.kept[ids]
            reference = scorers["teacher"].logits(own_ids)[:, :-1].flatten(0, 1)[keep]
            if numbering is not None:
                reference = reference[:, torch.from_numpy(numbering.order)]
            teacher_log_p = torch.log_softmax(reference[:, :vocab].float(), dim=-1)
            choice = None if numbering is None else reference[:, : numbering.tokens].argmax(-1)
            scores["teacher"].add(reference, teacher_log_p, targets, choice)
            for name in RUNGS[1:]:
                logits = scorers[name].logits(ids)[:, :-1].flatten(0, 1)[keep]
                scores[name].add(logits, teacher_log_p, targets, choice)
            owner.extend(np.full(w.scored, used.index(w.document), dtype=np.int64) for w in group)
            done += sum(w.scored for w in group)
            progress.step("verify", done, total)
    draws = document_draws(len(used), settings.bootstrap_samples, seed)
    document = np.concatenate(owner)
    hashes = {
        "teacher": subject.teacher.weights_sha256,
        "student": subject.student.weights_sha256,
        "quantized": subject.artifact.sha256,
        "shipped": subject.artifact.sha256,
    }
    reference_ppl = perplexity_of(mean_over_tokens(np.concatenate(scores["teacher"].nll), document, draws))
    rungs = [
        _rung(name, scores[name], document, draws, reference_ppl, hashes[name], scorers[name].runtime) for name in RUNGS
    ]
    shipped = rungs[-1]
    return Retention(
        task=task,
        metric="perplexity",
        higher_is_better=False,
        examples=len(document),
        documents=len(used),
        eval_sha256=_windows_sha256(windows),
        context_tokens=settings.context_tokens,
        stride_tokens=stride_of(settings.context_tokens, settings.stride_tokens),
        bos=tokenizer.bos is not None,
        bootstrap={"samples": settings.bootstrap_samples, "seed": seed},
        machine=machine.describe(),
        runtime_options=runtime_options,
        rungs=rungs,
        retention=Scored(value=shipped.retention, ci95=shipped.retention_ci95),
        agreement=Agreement(
            top1=shipped.top1_agreement,
            top1_ci95=shipped.top1_agreement_ci95,
            kl_mean_nats=shipped.kl_mean_nats,
            kl_mean_nats_ci95=shipped.kl_mean_nats_ci95,
            kl_p99_nats=shipped.kl_p99_nats,
            kl_p99_nats_ci95=shipped.kl_p99_nats_ci95,
        ),
        tokenizer=check,
        kept_tokens=None if numbering is None else len(numbering.kept),
        gate=Gate(min_retention=settings.min_retention, passed=shipped.retention_ci95[0] >= settings.min_retention),
    )


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
    subject: Subject, kept: NDArray[np.int64], held_out: list[list[str]], documents: list[NDArray[np.int32]]
) -> _Numbering:
    """`documents` are the held-out blocks in the student's ids.

    Raises UserError where the teacher's tokenizer cuts them otherwise: scores of tokens would not pair up.
    """
    tokenizer = TextTokenizer.load(Path(subject.teacher.path))
    for number, (own, ids) in enumerate(zip(encode_blocks(tokenizer, held_out), documents, strict=True)):
        if len(own) != len(ids) or (kept[ids] != own).any():
            raise UserError(
                f"block {number} of the held-out text ({held_out[number][0][:60]!r}) has other tokens in the student's"
                f" trimmed vocabulary of {len(kept):,} than in the teacher's: their scores cannot be paired",
                "verify on the text that the vocabulary was trimmed to, or distil with this text as --eval-data",
            )
    others = np.setdiff1d(np.arange(subject.teacher.shape.vocab_size), kept)
    return _Numbering(kept=kept, order=np.concatenate([kept, others]), tokens=tokenizer.vocab)


def stored_weights(subject: Subject) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """The artifact's weights as stored, dequantized, under their transformers names."""
    if subject.artifact.format == "gguf":
        from edgedistill.gguf.dequantize import dequantized as gguf_dequantized

        return gguf_dequantized(subject.folder / subject.artifact.entry)
    if subject.artifact.format == "bitsandbytes":
        from edgedistill.folders.bitsandbytes import dequantized as folder_dequantized

        return folder_dequantized(subject.folder / subject.artifact.entry)
    from edgedistill.onnx.dequantize import dequantized as onnx_dequantized

    config = read_json(Path(subject.student.path) / "config.json", what="config.json")
    return onnx_dequantized(subject.folder / subject.artifact.entry, config)


def _scoring_runtime(artifact: Artifact) -> RuntimeName:
    """onnxruntime-genai gives one row of logits at a time; onnxruntime runs the same graph and gives all."""
    return "onnxruntime" if artifact.runtime == "onnxruntime-genai" else artifact.runtime


def _check_tokenizer(subject: Subject, threads: int, store: Store, stack: ExitStack) -> TokenizerCheck:
    with RuntimeProcess(
        subject.artifact.runtime,
        subject.folder / subject.artifact.entry,
        threads=threads,
        context_tokens=64,
        logits_all=False,
        store=store,
    ) as process:

        def tokenize(text: str, add_special: bool, parse_special: bool) -> list[int]:
            return process.tokenize(text, add_special=add_special, parse_special=parse_special)

        # onnxruntime-genai has no way to read a control token in a text as text
        always_parsed = subject.artifact.runtime == "onnxruntime-genai"
        return check_tokenizer(Path(subject.student.path), tokenize, control_tokens_always_parsed=always_parsed)


def groups(windows: list[Window]) -> Iterator[list[Window]]:
    """Windows of one length together, so that nothing is padded."""
    by_length: dict[int, list[Window]] = {}
    for window in windows:
        by_length.setdefault(len(window.ids), []).append(window)
    for length, group in sorted(by_length.items()):
        size = max(1, GROUP_TOKENS // length)
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _windows_sha256(windows: list[Window]) -> str:
    digest = hashlib.sha256()
    for window in windows:
        digest.update(np.array([window.document, window.first, len(window.ids)], dtype="<i8").tobytes())
        digest.update(window.ids.astype("<i4").tobytes())
    return digest.hexdigest()


def _rung(
    name: RungName,
    scores: TokenScores,
    document: NDArray[np.int64],
    draws: NDArray[np.int32],
    reference: Summary,
    sha256: str,
    runtime: str,
) -> Rung:
    perplexity = perplexity_of(mean_over_tokens(np.concatenate(scores.nll), document, draws))
    accuracy = mean_over_tokens(np.concatenate(scores.correct), document, draws)
    kl_values = np.concatenate(scores.kl)
    kl = mean_over_tokens(kl_values, document, draws)
    p99 = p99_over_tokens(kl_values, document, draws)
    agree = mean_over_tokens(np.concatenate(scores.agree), document, draws)
    return Rung(
        rung=name,
        value=perplexity.value,
        ci95=perplexity.ci95,
        perplexity=perplexity.value,
        perplexity_ci95=perplexity.ci95,
        next_token_accuracy=accuracy.value,
        next_token_accuracy_ci95=accuracy.ci95,
        retention=reference.value / perplexity.value,
        retention_ci95=interval(reference.draws / perplexity.draws),
        kl_mean_nats=kl.value,
        kl_mean_nats_ci95=kl.ci95,
        kl_p99_nats=None if p99 is None else p99.value,
        kl_p99_nats_ci95=None if p99 is None else p99.ci95,
        top1_agreement=agree.value,
        top1_agreement_ci95=agree.ci95,
        artifact_sha256=sha256,
        basis="measured",
        runtime=runtime,
    )
