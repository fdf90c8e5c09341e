"""The retention ladder: teacher → student → quantized → shipped, on the same tokens.

    teacher     the original, torch fp32
    student     the trained weights, torch fp32
    quantized   the artifact's stored weights, dequantized into the torch model
    shipped     the artifact's bytes in the runtime that will run them

All rungs walk the windows together, so that no logits are kept; intervals are over documents (statistics.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgedistill import statistics
from edgedistill.config.recipe import Verify
from edgedistill.errors import GateFailed
from edgedistill.machine import facts
from edgedistill.progress import QUIET, Progress
from edgedistill.records.artifact import Artifact
from edgedistill.records.retention import (
    Agreement,
    Baselines,
    Departure,
    Measured,
    Neighbours,
    Rung,
    RungName,
    Scored,
    TokenizerCheck,
)
from edgedistill.records.training import StudentResult, TeacherResult
from edgedistill.runtimes.process import RuntimeName, RuntimeProcess
from edgedistill.runtimes.runners import ArtifactScorer, Scorer, TorchScorer, load_torch, with_weights
from edgedistill.statistics import (
    Estimate,
    by_unit,
    p99,
    perplexity,
    perplexity_ratio,
    positive_mean,
    proportion,
)
from edgedistill.store import Store
from edgedistill.strict import read_json
from edgedistill.tasks.causal_lm import stride_of
from edgedistill.verify.baselines import unigram
from edgedistill.verify.blame import against_model, in_runtime
from edgedistill.verify.limits import runtime_limit
from edgedistill.verify.scores import NEIGHBOURS, RUNGS, Scores, Text, score, some_ids, text_of, windows_sha256
from edgedistill.verify.tokenizer_check import check_tokenizer

MOST_NATS = 700.0  # a token: exp of more is no double


@dataclass(frozen=True)
class Subject:
    """What is verified: an artifact, the model it was made of, and the teacher that both are held to.

    `masters`: the checkpoint that the artifact was exported from, where that is not the student (quantization-aware
    distillation).
    """

    artifact: Artifact
    folder: Path
    student: StudentResult
    teacher: TeacherResult
    masters: Path | None = None


def climb(
    subject: Subject,
    *,
    held_out: list[list[str]],
    settings: Verify,
    threads: int,
    store: Store,
    task: str = "causal-lm",
    progress: Progress = QUIET,
) -> Measured:
    """Score every rung on `held_out`, and hold each to its neighbour; the gate is judged apart (gate.py).

    `held_out` is blocks of documents; a block is what the intervals resample, and counts once however often it is
    given. Raises UserError where the text is too short; GateFailed where a rung gives no numbers; RuntimeCrashed
    where the artifact's runtime dies.
    """
    text = text_of(subject.teacher, subject.student, held_out, settings)
    with ExitStack() as stack:
        check = _check_tokenizer(subject, threads, store, stack)
        departures = against_model(subject.artifact, subject.folder, subject.masters or Path(subject.student.path))
        process = stack.enter_context(
            RuntimeProcess(
                _scoring_runtime(subject.artifact),
                subject.folder / subject.artifact.entry,
                threads=threads,
                context_tokens=settings.context_tokens,
                store=store,
            )
        )
        quantized = with_weights(Path(subject.student.path), stored_weights(subject))
        scorers: dict[RungName, Scorer] = {
            "teacher": TorchScorer(load_torch(Path(subject.teacher.path))),
            "student": TorchScorer(load_torch(Path(subject.student.path))),
            "quantized": TorchScorer(quantized),
            "shipped": ArtifactScorer(process),
        }
        scored = score(text, scorers, progress)
        _require_numbers(scored, subject, departures)
        neighbours = [_neighbours(*pair, scored) for pair in NEIGHBOURS]
        if neighbours[-1].kl_mean_nats.value > runtime_limit(artifact_name(subject.artifact)):
            departures += in_runtime(
                subject.artifact, subject.folder, model=quantized, checkpoint=Path(subject.student.path),
                process=process, ids_T=some_ids(text, settings.context_tokens),
            )  # fmt: skip
        runtimes = {name: scorer.runtime for name, scorer in scorers.items()}
        options = process.info["options"]
    rungs = _rungs(subject, scored, runtimes)
    shipped = rungs[-1]
    return Measured(
        task=task,
        metric="perplexity",
        higher_is_better=False,
        examples=len(scored.document),
        documents=len(set(text.unit_of.values())),
        effective_documents=statistics.effective_units(np.bincount(scored.document)),
        duplicate_documents=text.duplicates,
        eval_sha256=windows_sha256(text.windows),
        context_tokens=settings.context_tokens,
        stride_tokens=stride_of(settings.context_tokens, settings.stride_tokens),
        bos=text.bos,
        intervals=statistics.METHOD,
        machine=facts.describe(),
        runtime_options=options,
        artifact=artifact_name(subject.artifact),
        made_of="student" if subject.masters is None else "masters",
        rungs=rungs,
        baselines=_baselines(text, scored),
        neighbours=neighbours,
        departures=departures,
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
        kept_tokens=None if text.numbering is None else len(text.numbering.kept),
    )


def artifact_name(artifact: Artifact) -> str:
    return f"{artifact.format}:{artifact.quantization}"


def _require_numbers(scored: Scores, subject: Subject, departures: list[Departure]) -> None:
    """GateFailed where a rung's scores are no numbers, or beyond what a perplexity can be."""
    for name in RUNGS:
        nll = np.concatenate(scored.rungs[name].nll)
        wrong = int(np.count_nonzero(~np.isfinite(nll)))
        if wrong or nll.mean() > MOST_NATS:
            named = "".join(f"; {departure.tensor} {departure.said}" for departure in departures[:1])
            what = (
                f"gives no numbers for {wrong:,} of {len(nll):,} tokens"
                if wrong
                else f"gives the text {nll.mean():,.0f} nats a token"
            )
            raise GateFailed(
                f"{artifact_name(subject.artifact)}: {name} {what}{named}",
                "the weights, or what computes with them, are damaged: check the teacher and the student, and export"
                " the artifact again",
            )


def _neighbours(above: RungName, below: RungName, scored: Scores) -> Neighbours:
    pair = scored.pairs[above, below]
    return Neighbours(
        above=above,
        below=below,
        kl_mean_nats=_recorded(positive_mean(scored.by_document(pair.kl))),
        perplexity_ratio=_recorded(perplexity_ratio(scored.loss(below), scored.loss(above))),
        top1_agreement=float(np.concatenate(pair.agree).mean()),
    )


def _baselines(text: Text, scored: Scores) -> Baselines:
    counted = unigram(scored.targets, scored.document, text.vocab)
    uniform = np.full(len(scored.document), np.log(text.teacher_tokens))
    words, guess = (by_unit(nll, scored.document) for nll in (counted.nll, uniform))
    return Baselines(
        tokens=text.teacher_tokens,
        uniform_over_teacher=_recorded(perplexity_ratio(guess, scored.loss("teacher"))),
        unigram_perplexity=float(np.exp(counted.nll.mean())),
        unigram_over_teacher=_recorded(perplexity_ratio(words, scored.loss("teacher"))),
        smoothing=counted.smoothing,
    )


def _recorded(estimate: Estimate) -> Scored:
    return Scored(value=estimate.value, ci95=estimate.ci95)


def _rungs(subject: Subject, scored: Scores, runtimes: Mapping[RungName, str]) -> list[Rung]:
    hashes = {
        "teacher": subject.teacher.weights_sha256,
        "student": subject.student.weights_sha256,
        "quantized": subject.artifact.sha256,
        "shipped": subject.artifact.sha256,
    }
    return [_rung(name, scored, hashes[name], runtimes[name]) for name in RUNGS]


def stored_weights(subject: Subject) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """The artifact's weights as stored, dequantized, under their transformers names."""
    if subject.artifact.format == "gguf":
        from edgedistill.gguf.dequantize import dequantized as gguf_dequantized

        return gguf_dequantized(subject.folder / subject.artifact.entry)
    if subject.artifact.format == "bitsandbytes":
        from edgedistill.other_formats.bitsandbytes import dequantized as folder_dequantized

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


def _rung(name: RungName, scored: Scores, sha256: str, runtime: str) -> Rung:
    scores = scored.rungs[name]
    ppl = perplexity(scored.loss(name))
    accuracy, agree = (proportion(scored.by_document(hits)) for hits in (scores.correct, scores.agree))
    kept = perplexity_ratio(scored.loss("teacher"), scored.loss(name))
    kl = positive_mean(scored.by_document(scores.kl))
    tail = p99(np.concatenate(scores.kl), scored.document)
    return Rung(
        rung=name,
        value=ppl.value,
        ci95=ppl.ci95,
        perplexity=ppl.value,
        perplexity_ci95=ppl.ci95,
        next_token_accuracy=accuracy.value,
        next_token_accuracy_ci95=accuracy.ci95,
        retention=kept.value,
        retention_ci95=kept.ci95,
        kl_mean_nats=kl.value,
        kl_mean_nats_ci95=kl.ci95,
        kl_p99_nats=None if tail is None else tail.value,
        kl_p99_nats_ci95=None if tail is None else tail.ci95,
        top1_agreement=agree.value,
        top1_agreement_ci95=agree.ci95,
        artifact_sha256=sha256,
        basis="measured",
        runtime=runtime,
    )
