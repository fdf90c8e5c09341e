"""The gate: named checks over what was measured. docs/gate.md says why each is there, and where its limit comes from.

A pure function of the record and of `min_retention`, so that a reader of retention.json can judge it again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from edgedistill.records.retention import Check, CheckName, Gate, Measured, Neighbours, Retention, RungName, Scored
from edgedistill.statistics import MIN_UNITS, counted
from edgedistill.verify.limits import DEFAULT_MIN_RETENTION, MAX_MISMATCH_SHARE, quantizing_limit, runtime_limit

MORE_DOCUMENTS = (
    f"give at least {MIN_UNITS:g} documents of about equal length, better 20 or more: a longer text with --data (in a"
    " build also --eval-data, or a larger data.eval_share), and a larger verify.max_tokens where it cut some off. Lines"
    " and paragraphs of one text file count together, in blocks of data.min_document_chars: give a row a document"
    " (.jsonl), or name what ends one with --document-separator"
)


def judge(measured: Measured, min_retention: float) -> Gate:
    """Every check, and the verdict: failed where one fails, else too few documents where one cannot tell."""
    checks = [
        *_teacher(measured),
        _files(measured),
        _tokenizer(measured),
        *_neighbours(measured),
        _retention(measured, min_retention),
        *_agreement(measured, min_retention),
    ]
    outcomes = [check.passed for check in checks]
    verdict = "failed" if False in outcomes else "too few documents to tell" if None in outcomes else "passed"
    return Gate(min_retention=min_retention, passed=verdict == "passed", verdict=verdict, checks=checks)


def judged(measured: Measured, min_retention: float) -> Retention:
    """The record with its gate."""
    fields = {name: getattr(measured, name) for name in type(measured).model_fields if name != "gate"}
    return Retention(**fields, gate=judge(measured, min_retention))


def failures(gate: Gate) -> list[str]:
    """What did not pass, a line each: the rung, what was compared, and why."""
    wrong = [check for check in gate.checks if check.passed is False]
    # documents are too few for all at once: what the gate is about is said
    told = wrong or [check for check in gate.checks if check.passed is None and check.name == "retention"]
    return [f"{check.rung}: {check.why}" for check in told]


def remedy(gate: Gate, length: str = "") -> str:
    """What to do about the first check that did not pass. `length`: the field that says how long the student trains."""
    if gate.verdict == "too few documents to tell":
        return MORE_DOCUMENTS
    first = next(check for check in gate.checks if check.passed is False)
    return REMEDIES[first.name].replace("distill.epochs", f"distill.{length}" if length else "distill.epochs")


REMEDIES: dict[CheckName, str] = {
    "teacher against a uniform guess": "check the teacher: its weights, its tokenizer, and that it knows this text",
    "teacher against word counts": "check the teacher and the held-out text: retention says nothing if counts of words"
    " predict the text as well as the teacher; train it longer, or verify on text that it knows",
    "files against the model": "export the artifact again from this student, or name the student that it was made from",
    "tokenizer": "the runtime would read text that the model was not trained on: report it with tokenizer.json",
    "quantized against student": "the artifact is not this student, or its quantization destroys it: export it again,"
    " with a finer quantization (export.artifacts) or an importance matrix",
    "shipped against quantized": "the runtime does not compute what torch does with the same weights: export again, and"
    " report it with the model's config.json",
    "retention": "train longer (distill.epochs), allow a larger student (student.compression), a finer quantization"
    " (export.artifacts), or accept less with --min-retention",
    "agreement": "check the teacher: it may be damaged, or not know this text; if the student is meant to be better"
    " than its teacher, accept less agreement with --min-retention",
}


def _low(scored: Scored) -> float | None:
    return None if scored.ci95 is None else scored.ci95[0]


def _reaches(scored: Scored, limit: float) -> bool | None:
    """Whether the interval's lower end does; None where there is no interval."""
    low = _low(scored)
    return None if low is None else low >= limit


def spanned(scored: Scored, digits: int = 3) -> str:
    if scored.ci95 is None:
        return f"{scored.value:.{digits}f} (no interval)"
    return f"{scored.value:.{digits}f} (95 % interval {scored.ci95[0]:.{digits}f} to {scored.ci95[1]:.{digits}f})"


def _too_few(measured: Measured) -> str:
    return f": too few documents to tell, {counted(measured.documents, measured.effective_documents)}"


def _teacher(measured: Measured) -> Iterator[Check]:
    """A teacher that a guess without a model beats says nothing of what was kept."""
    base, teacher = measured.baselines, measured.rungs[0]
    guesses: tuple[tuple[CheckName, Scored, str], ...] = (
        (
            "teacher against a uniform guess",
            base.uniform_over_teacher,
            f"a uniform guess over its {base.tokens:,} tokens",
        ),
        (
            "teacher against word counts",
            base.unigram_over_teacher,
            f"counts of words in the other documents (perplexity {base.unigram_perplexity:.2f})",
        ),
    )
    for name, scored, guess in guesses:
        low = _low(scored)
        passed = None if low is None else low > 1
        why = f"the teacher's perplexity is {teacher.perplexity:.2f}, that of {guess} {spanned(scored)} times as large"
        if passed is False:
            why += "; the interval has to be above 1, or the teacher knows nothing that could be kept"
        yield Check(
            name=name, compares="teacher with a guess", value=scored.value, unit="perplexity ratio", ci95=scored.ci95,
            limit=1.0, bound="more than", passed=passed, rung="teacher",
            why=why + (_too_few(measured) if passed is None else ""),
        )  # fmt: skip


def _files(measured: Measured) -> Check:
    """The artifact's bytes against the model that they were made of, read and not run."""
    found = [departure for departure in measured.departures if departure.found == "file"]
    made_of = "the student" if measured.made_of == "student" else "the masters that it was exported from"
    why = f"the artifact's files hold {made_of}, up to the rounding of {measured.artifact}"
    if found:
        rest = f"; and {len(found) - 1} more" if len(found) > 1 else ""
        why = f"the artifact's files do not hold {made_of}: {found[0].tensor} {found[0].said}{rest}"
    return Check(
        name="files against the model", compares=f"artifact with {made_of}", value=float(len(found)),
        unit="tensors or keys that differ", limit=0.0, bound="at most", passed=not found,
        rung=found[0].rung if found else "quantized",
        tensor=found[0].tensor if found else None, why=why,
    )  # fmt: skip


def _tokenizer(measured: Measured) -> Check:
    check = measured.tokenizer
    share = check.mismatches / max(1, check.texts)
    why = (
        f"the artifact's tokenizer gives the original's ids on {check.texts - check.mismatches} of {check.texts} texts"
    )
    if check.mismatches:
        why += f", not on: {check.first_mismatch}"
    return Check(
        name="tokenizer", compares="artifact's tokenizer with the original's", value=share, unit="share of texts",
        limit=MAX_MISMATCH_SHARE, bound="at most", passed=share <= MAX_MISMATCH_SHARE, rung="shipped", why=why,
    )  # fmt: skip


def _neighbours(measured: Measured) -> Iterator[Check]:
    """Two rungs of one model must be one model; the distance is a property of the artifact, not of a sample."""
    for pair in measured.neighbours:
        if pair.below == "quantized" and measured.made_of == "masters":
            continue  # these went on from the student: "files against the model" holds the artifact to them
        limit = (quantizing_limit if pair.below == "quantized" else runtime_limit)(measured.artifact)
        yield _pair_check(measured, pair, limit)


def _pair_check(measured: Measured, pair: Neighbours, limit: float) -> Check:
    value = pair.kl_mean_nats.value
    passed = value <= limit
    # what the runtime computes otherwise says more than a key of the file
    named = [d for d in measured.departures if d.rung == pair.below]
    found = next((d for d in named if d.found == "runtime"), named[0] if named else None)
    names: dict[RungName, CheckName] = {
        "quantized": "quantized against student",
        "shipped": "shipped against quantized",
    }
    why = (
        f"{pair.below} departs from {pair.above} by {value:.3g} nats a token (KL), perplexity"
        f" {pair.perplexity_ratio.value:.4f} times, the same likeliest token for {pair.top1_agreement:.1%}"
    )
    what = "that quantization costs" if pair.below == "quantized" else "that runtime's rounding costs"
    why += f"; {measured.artifact}: at most {limit:g} is what {what}" if not passed else ""
    if not passed and found is not None:
        why += f"; {found.tensor}: {found.said}" if pair.below == "shipped" else f"; first {found.tensor}"
    return Check(
        name=names[pair.below], compares=f"{pair.below} with {pair.above}", value=value, unit="nats a token",
        ci95=pair.kl_mean_nats.ci95, limit=limit, bound="at most", passed=passed, rung=pair.below,
        tensor=found.tensor if found is not None and not passed else None, why=why,
    )  # fmt: skip


def _retention(measured: Measured, min_retention: float) -> Check:
    kept = measured.retention
    passed = _reaches(kept, min_retention)
    why = f"retention {spanned(kept)}; the gate asks for {min_retention:g} at its lower end"
    return Check(
        name="retention", compares="shipped with teacher", value=kept.value, unit="retention", ci95=kept.ci95,
        limit=min_retention, bound="at least", passed=passed, rung="shipped",
        why=why + (_too_few(measured) if passed is None else ""),
    )  # fmt: skip


def _agreement(measured: Measured, min_retention: float) -> Iterator[Check]:
    """Above 1 perplexity says no longer how much was kept, for the artifact is the better model of this text.

    What it would keep on text of the teacher's own is exp(-KL(teacher ‖ artifact)), the same ratio of perplexities; and
    what the teacher keeps of the artifact on this text is 1 ÷ retention. Both are held to the retention's own limit,
    though to no more than the default's.
    """
    low = _low(measured.retention)
    if low is None:
        return
    kl = measured.agreement.kl_mean_nats
    limit, above = min(min_retention, DEFAULT_MIN_RETENTION), low > 1
    kept = math.exp(-kl) if not above else min(math.exp(-kl), 1 / low)
    passed = not above or kept >= limit
    why = (
        f"on text of the teacher's own, retention would be {math.exp(-kl):.3f} (exp(-KL), {kl:.3g} nats a token),"
        f" likeliest tokens agree for {measured.agreement.top1:.1%}"
    )
    if not passed:
        why = (
            f"retention {spanned(measured.retention)} says that the artifact is better than its teacher, but they"
            f" agree too little: {why}, and the teacher keeps {1 / low:.3f} of the artifact at most; at least"
            f" {limit:g} is asked of both where retention is above 1"
        )
    yield Check(
        name="agreement", compares="shipped with teacher", value=kept, unit="kept, either way",
        limit=limit if above else 0.0, bound="at least", passed=passed, rung="teacher", why=why,
    )  # fmt: skip
