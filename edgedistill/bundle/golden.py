"""Golden vectors replayed: the shipped bytes in their runtime on this machine, held to what was recorded.

Whatever a manifest says of its vectors is derived again or refused: tolerances from what was seen and our floors, how
many tokens are compared from the recorded rows.

Legend: T tokens of a prompt, N greedy tokens, R = T + N rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgedistill.bundle.fingerprint import fingerprint, first_difference
from edgedistill.bundle.golden_make import compared, kernels, rows_compared, vocabulary_of
from edgedistill.bundle.golden_rules import (
    COMPARED,
    MIN_ROWS_COMPARED,
    Compact,
    Statistics,
    compact,
    least_damage,
    outputs,
    scale_of,
    statistics,
    too_much_seen,
)
from edgedistill.bundle.npy import load_array
from edgedistill.errors import UserError
from edgedistill.machine import facts
from edgedistill.records.golden import Golden, GoldenCase
from edgedistill.records.manifest import BundleArtifact
from edgedistill.runtimes.bounds import replay_of
from edgedistill.runtimes.chat import chat_differs, check_rendering
from edgedistill.runtimes.confine import layers_off
from edgedistill.runtimes.process import RuntimeProcess
from edgedistill.store import Store

REPLAY_THREADS = 4
SMALL_BYTES = 256 << 20
# Tolerances are written and read as decimals.
RELATIVE = 1e-6


@dataclass(frozen=True)
class Replayed:
    """A replay that passed: `largest_deviation`, `tolerance` of the logits, `found`, `allowed` of every statistic.

    `tokens_compared`: rows whose best token was held to the recorded one; `greedy_compared`: decoded tokens that were.
    `alike`: whether runtime, kernels and CPU are those that made the vectors.
    """

    artifact: str
    runtime_version: str
    cases: int
    tokens_compared: int
    greedy_compared: int
    largest_deviation: float
    tolerance: float
    found: Statistics
    allowed: Statistics
    alike: bool
    notes: list[str]


@dataclass(frozen=True)
class _Case:
    """A recorded case, read."""

    record: GoldenCase
    text: str
    tokens: NDArray[np.int32]
    greedy: NDArray[np.int32]
    last_V: NDArray[np.float32]
    kept: Compact


def replay(root: Path, artifact: BundleArtifact, *, store: Store | None = None) -> Replayed:
    """Compute a bundle's golden vectors again on this machine and compare.

    Raises UserError naming the file, the key or the tensor, the deviation and the tolerance; and where the runtime is
    not installed. RuntimeCrashed where it dies.
    """
    golden = artifact.golden
    cases = [_read(root, golden, case) for case in golden.cases]
    check_record(artifact, cases)
    model = root / artifact.folder / artifact.entry
    check_fingerprint(root, artifact)
    # A small model gains nothing from more threads, which on a busy machine wait for each other.
    threads = 1 if artifact.bytes < SMALL_BYTES else min(REPLAY_THREADS, len(facts.usable_cpus()))
    # Prompt and continuation twice: token by token, and in one batch.
    tokens_in_all = 2 * sum(case.token_count + golden.new_tokens for case in golden.cases)
    with RuntimeProcess(
        artifact.runtime,
        model,
        threads=threads,
        context_tokens=golden.context_tokens,
        store=store,
        bounds=replay_of(tokens_in_all),
    ) as runtime:
        done = replay_vectors(runtime, artifact, cases)
        notes = _replay_notes(artifact, runtime.info) + _check_chat(runtime, root, artifact)
    if done.tokens_compared < MIN_ROWS_COMPARED:
        notes.append(
            f"{artifact.name}: the model's logits are flat: {done.tokens_compared} rows leave one best token alone, so "
            "rms, scale, kl and rank tell, and hardly any token does"
        )
    return Replayed(**{**vars(done), "notes": notes})


def read_cases(root: Path, artifact: BundleArtifact) -> list[_Case]:
    """The recorded cases of an artifact. Raises UserError for a file that is not what it should be."""
    return [_read(root, artifact.golden, case) for case in artifact.golden.cases]


def _read(root: Path, golden: Golden, case: GoldenCase) -> _Case:
    arrays = {
        path: load_array(root / path, dtype, shape, what=path) for path, (dtype, shape) in golden.files(case).items()
    }
    for path in (case.tokens, case.greedy, case.ids):
        if arrays[path].min() < 0 or arrays[path].max() >= golden.vocab_size:
            raise _refused(f"{path} holds token ids that are not below {golden.vocab_size}")
    for path in (case.logits, case.rows):
        if not np.isfinite(arrays[path]).all():
            raise _refused(f"{path} holds logits that are not finite: off by inf")
    kept = Compact(arrays[case.ids], arrays[case.rows])
    text = _text(root / case.prompt, case.prompt)
    return _Case(case, text, arrays[case.tokens], arrays[case.greedy], arrays[case.logits], kept)


def check_record(artifact: BundleArtifact, cases: Sequence[_Case]) -> None:
    """Raises UserError for vectors that do not belong together, and for tolerances or counts that are not theirs."""
    golden = artifact.golden
    for case in cases:
        _check_rows(golden, case)
    scale = scale_of([case.last_V for case in cases])
    named = {output.name: output for output in golden.outputs}
    if len(named) != len(golden.outputs) or set(named) != {"tokens", "greedy", *COMPARED}:
        raise _refused(f"the golden vectors of {artifact.name} are of {', '.join(sorted(named))}")
    seen: Statistics = {name: named[name].largest_seen for name in COMPARED}
    alike: Statistics = {name: named[name].seen_alike for name in COMPARED}
    if why := too_much_seen(artifact.quantization, scale, seen, alike):
        raise _refused(f"the golden vectors of {artifact.name} let everything pass: {why[0]}")
    for wanted in outputs(artifact.quantization, scale, seen, alike):
        found = named[wanted.name]
        for field in ("tolerance", "tolerance_alike", "largest_seen", "seen_alike"):
            given, derived = getattr(found, field), getattr(wanted, field)
            if not math.isclose(given, derived, rel_tol=RELATIVE, abs_tol=1e-12):
                raise _refused(f"{field} of {found.name} of {artifact.name} is {given:.4g}, and {derived:.4g} follows")
    tolerance = named["logits"].tolerance
    least = least_damage(named["logits"], golden.damage_is_seen)
    for case in cases:
        record = case.record
        counts = compared(case.kept, record.token_count, golden.new_tokens, tolerance)
        for field, count in counts.items():
            if getattr(record, field) != count:
                where = record.greedy if field == "greedy_compared" else record.rows
                raise _refused(f"{field} of {where} is {getattr(record, field)}, and {count} follow from its rows")
        _check_case(golden, case, least)
    total = sum(rows_compared(case.kept, tolerance) for case in cases)
    if total < MIN_ROWS_COMPARED:
        raise _refused(
            f"the golden vectors of {artifact.name} compare {total} rows, at least {MIN_ROWS_COMPARED} must be"
        )


def _check_rows(golden: Golden, case: _Case) -> None:
    """The parts of a case belong together."""
    record, kept = case.record, case.kept
    last = record.token_count - 1
    if record.token_count + golden.new_tokens > golden.context_tokens:
        raise _refused(f"{record.tokens} has more tokens than the context of {golden.context_tokens}")
    again = compact(case.last_V[None])
    apart = float(np.abs(again.rows - kept.rows[last : last + 1]).max())
    if apart > 1e-5 * (1 + float(np.abs(again.rows).max())):
        raise _refused(f"{record.logits} is off by {apart:.4g} from the row of {record.rows} that is its own")
    if not np.array_equal(again.ids_RK, kept.ids_RK[last : last + 1]):
        raise _refused(f"{record.logits} has other best tokens than {record.ids}")
    best = kept.rows[:, 1 : 1 + kept.ids_RK.shape[1]]
    if (np.diff(best, axis=1) > 0).any() or (best[:, 0] > kept.rows[:, 0]).any():
        raise _refused(f"{record.rows} is not ordered by its best ids")


def _check_case(golden: Golden, case: _Case, least_damage: float) -> None:
    """What the manifest says of a case follows from its files, and its prompt is worth keeping."""
    record = case.record
    stops = [number for number, token in enumerate(case.greedy) if token in set(golden.vocabulary.stop)]
    if record.stops_after != (stops[0] if stops else None):
        raise _refused(f"stops_after of {record.greedy} is {record.stops_after}, and its tokens say {stops[:1]}")
    if not record.damaged or min(record.damaged.values()) <= least_damage:
        raise _refused(f"the prompt {record.prompt} does not tell damaged tokens from whole ones: {record.damaged}")


def check_fingerprint(root: Path, artifact: BundleArtifact) -> None:
    """Raises UserError naming the first setting or tensor of the artifact that is not the recorded one."""
    golden = artifact.golden
    found = fingerprint(artifact.format, root / artifact.folder / artifact.entry)
    where = f"{artifact.folder}/{artifact.entry}" if artifact.entry != "." else artifact.folder
    for what, recorded, now in (
        ("settings", golden.settings, found.settings),
        ("weights", golden.weights, found.weights),
    ):
        if why := first_difference(recorded, now):
            raise _refused(f"{where} is not what the golden vectors were made with: {what}: {why}")
    stated = [
        value for name, value in found.settings.items() if name.endswith((".context_length", "model.context_length"))
    ]
    for value in stated:
        if not isinstance(value, int) or value < artifact.context_tokens:
            raise _refused(f"{where} says a context of {value}, and the manifest {artifact.context_tokens}")
    if why := chat_differs(golden.chat, root / "preprocess", found.settings, root / artifact.folder / artifact.entry):
        raise _refused(f"{artifact.name}: {why}")


def replay_vectors(runtime: RuntimeProcess, artifact: BundleArtifact, cases: Sequence[_Case]) -> Replayed:
    """Run every prompt and compare; all that stands in the manifest beside it was checked before."""
    golden, version = artifact.golden, str(runtime.info["runtime_version"])
    alike = kernels(runtime.info) == golden.kernels
    allowed: Statistics = {
        output.name: output.tolerance_alike if alike else output.tolerance
        for output in golden.outputs
        if output.name in COMPARED
    }
    if int(runtime.info["vocab_size"]) != golden.vocab_size:
        how = f"has {runtime.info['vocab_size']} tokens, not {golden.vocab_size}"
        raise _broken(artifact, version, "the vocabulary", how)
    if why := first_difference(golden.vocabulary.model_dump(), vocabulary_of(runtime).model_dump()):
        raise _broken(artifact, version, "the special tokens", why)
    greedy_compared = tokens_compared = 0
    found_RV: list[NDArray[np.float32]] = []
    for case in cases:
        _check_tokens(runtime, artifact, case)
        logits_RV = runtime.logits([*case.tokens.tolist(), *case.greedy.tolist()])
        tokens_compared += _check_best(artifact, version, case, logits_RV, allowed["logits"])
        greedy_compared += _check_greedy(runtime, artifact, case, logits_RV, allowed["logits"])
        found_RV.append(logits_RV)
    found = _check_statistics(artifact, version, cases, found_RV, allowed)
    return Replayed(
        artifact=artifact.name,
        runtime_version=version,
        cases=len(cases),
        tokens_compared=tokens_compared,
        greedy_compared=greedy_compared,
        largest_deviation=found["logits"],
        tolerance=allowed["logits"],
        found=found,
        allowed=allowed,
        alike=alike,
        notes=[],
    )


def _check_tokens(runtime: RuntimeProcess, artifact: BundleArtifact, case: _Case) -> None:
    golden = artifact.golden
    if golden.tokenized_by != "artifact":
        return
    found = runtime.tokenize(case.text, add_special=golden.add_special, parse_special=golden.parse_special)
    if found != case.tokens.tolist():
        how = f"the prompt's tokens are {found[:8]}…, not {case.tokens[:8].tolist()}…"
        raise _broken(artifact, str(runtime.info["runtime_version"]), case.record.tokens, how)


def _check_best(
    artifact: BundleArtifact, version: str, case: _Case, logits_RV: NDArray[np.float32], tolerance: float
) -> int:
    """The best token of every row is the recorded one, or one that a tolerated difference could make best.

    How many rows leave no choice.
    """
    possible_RK = case.kept.may_be_best(tolerance)
    best_R = logits_RV.argmax(axis=1)
    is_best_RK = case.kept.ids_RK == best_R[:, None]
    # A row all of whose ids may be best says nothing: the best one may be another still.
    wrong = np.flatnonzero(~(possible_RK & is_best_RK).any(axis=1) & ~possible_RK.all(axis=1))
    if len(wrong):
        row = int(wrong[0])
        how = (
            f"the best token of {len(wrong)} of {len(best_R)} rows is another: after {row + 1} tokens {best_R[row]}, "
            f"not {case.kept.ids_RK[row, 0]}"
        )
        raise _broken(artifact, version, case.record.ids, how)
    return int((possible_RK.sum(axis=1) == 1).sum())


def _check_greedy(
    runtime: RuntimeProcess, artifact: BundleArtifact, case: _Case, logits_RV: NDArray[np.float32], tolerance: float
) -> int:
    """Decoding token by token: the recorded ids until one may turn; how many were held to."""
    version, count = str(runtime.info["runtime_version"]), case.record.token_count
    found = runtime.greedy(case.tokens, artifact.golden.new_tokens)
    # Other batch shapes are other kernels, here too: what they may differ by is the tolerance of any machine.
    wide = next(output.tolerance for output in artifact.golden.outputs if output.name == "logits")
    sure = compared(case.kept, count, len(found), wide)["greedy_compared"]
    expected = case.greedy.tolist()
    if found[:sure] != expected[:sure]:
        how = f"the greedy continuation is {found[:sure]}, not {expected[:sure]}"
        raise _broken(artifact, version, case.record.greedy, how)
    same = next((n for n, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b), len(found))
    steps_NV = logits_RV[count - 1 : count - 1 + len(found)]
    # The first token that is another was taken from the same beginning: it must be nearly as good.
    for step in range(min(same + 1, len(found))):
        behind = float(steps_NV[step].max() - steps_NV[step, found[step]])
        if not behind <= 2 * wide:
            how = f"a token decoded one by one is {behind:.4g} behind the best one of a whole batch"
            raise _broken(artifact, version, case.record.greedy, how)
    return sure


def _check_statistics(
    artifact: BundleArtifact,
    version: str,
    cases: Sequence[_Case],
    found_RV: Sequence[NDArray[np.float32]],
    allowed: Statistics,
) -> Statistics:
    """Every statistic over all prompts; where one is too large, the prompt that is furthest off is named."""
    found = statistics([case.kept for case in cases], found_RV)
    last = [
        float(np.abs(logits[case.record.token_count - 1].astype(np.float64) - case.last_V).max())
        for case, logits in zip(cases, found_RV, strict=True)
    ]
    if not all(math.isfinite(value) for value in last):
        last = [value if math.isfinite(value) else math.inf for value in last]
    found["logits"] = max(found["logits"], *last)
    for name in COMPARED:
        if found[name] <= allowed[name]:
            continue
        each = [statistics([case.kept], [logits])[name] for case, logits in zip(cases, found_RV, strict=True)]
        if name == "logits":
            each = [max(pair) for pair in zip(each, last, strict=True)]
        worst = cases[int(np.argmax(each))].record
        where = worst.logits if name == "logits" else worst.rows
        raise _broken(
            artifact, version, where, f"{name} is off by {found[name]:.4g}, and {allowed[name]:.4g} is allowed"
        )
    return found


def _check_chat(runtime: RuntimeProcess, root: Path, artifact: BundleArtifact) -> list[str]:
    """Render the recorded conversation; a note where this machine has nothing to render with."""
    chat = artifact.golden.chat
    if chat is None:
        return []
    try:
        why = check_rendering(runtime, chat, root / "preprocess")
    except UserError as error:
        if "jinja2" not in error.cause:
            raise
        return [f"{artifact.name}: jinja2 is not installed: the chat template was compared, and not rendered"]
    if why:
        raise _refused(f"preprocess/{chat.template}: {why}")
    return []


def _refused(what: str) -> UserError:
    return UserError(what, "take the bundle again from where it was made, or make it again")


def _broken(artifact: BundleArtifact, version: str, where: str, how: str) -> UserError:
    return UserError(
        f"golden replay of {artifact.name} failed in {version}: {where}: {how}",
        f"the files are whole, so this machine's runtime computes something else: try another build of "
        f"{artifact.runtime} (the bundle was made with {artifact.golden.runtime_version})",
    )


def _replay_notes(artifact: BundleArtifact, info: dict[str, Any]) -> list[str]:
    notes = []
    made_with = artifact.golden.runtime_version
    if info["runtime_version"] != made_with:
        notes.append(f"{artifact.name}: replayed in {info['runtime_version']}; the vectors were made in {made_with}")
    if info["options"].get("use_extra_bufts") is False:
        notes.append(f"{artifact.name}: use_extra_bufts is off: {info['options'].get('use_extra_bufts_reason', '')}")
    notes += [f"{artifact.name}: replayed without a layer of its bounds: {off}" for off in layers_off(info["bounds"])]
    if artifact.golden.damage_is_seen == "alike":
        notes.append(
            f"{artifact.name}: the model hardly looks at its tokens: on other machines than the maker's, damaged "
            "prompts are not told from whole ones"
        )
    if artifact.golden.tokenized_by != "artifact":
        notes.append(f"{artifact.name}: {artifact.runtime} holds no tokenizer: the tokens were taken as they are")
    return notes


def _text(path: Path, what: str) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{what} is not UTF-8: byte {error.start}", "make the bundle again") from error
