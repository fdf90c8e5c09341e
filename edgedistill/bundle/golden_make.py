"""Golden vectors made: prompts that tell right from wrong, what the shipped bytes give for them, and how sure that is.

Legend: T tokens of a prompt, N greedy tokens, R = T + N rows, V vocabulary.

The tolerances are measured: the same rows are computed in every way that this machine offers (prompts alone and cut at
several places, token by token, other thread counts, with and without llama.cpp's extra buffers); see golden_rules.py.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgedistill.bundle.fingerprint import fingerprint
from edgedistill.bundle.golden_prompts import LONG, Encode, Prompt, chosen
from edgedistill.bundle.golden_rules import (
    MIN_ROWS_COMPARED,
    Compact,
    Statistics,
    compact,
    largest_of,
    least_damage,
    outputs,
    scale_of,
    statistics,
    too_much_seen,
)
from edgedistill.errors import RuntimeCrashed, UserError
from edgedistill.machine import facts
from edgedistill.records.artifact import Artifact
from edgedistill.records.golden import DamageSeen, Golden, GoldenCase, GoldenOutput, GoldenVocabulary
from edgedistill.runtimes.chat import chat_differs, made_chat
from edgedistill.runtimes.process import RuntimeProcess
from edgedistill.store import Store

NEW_TOKENS = 16
MAX_PROMPT_TOKENS = 192
# Options of a runtime that decide which kernels compute.
KERNEL_OPTIONS = (
    "use_extra_bufts", "n_batch", "n_ubatch", "kv_cache", "flash_attention", "n_gpu_layers", "system", "providers",
    "device",
)  # fmt: skip


@dataclass
class _Case:
    prompt: Prompt
    greedy: list[int]
    kept: Compact  # [R]
    last_V: NDArray[np.float32]  # after the prompt

    @property
    def batch(self) -> list[int]:
        return [*self.prompt.tokens, *self.greedy]

    @property
    def steps(self) -> Compact:
        """The rows that each greedy token was taken from."""
        first = len(self.prompt.tokens) - 1
        return self.kept.part(first, first + len(self.greedy))


@dataclass
class _Seen:
    """Statistics between ways to compute the same, and what these were."""

    others: list[Statistics]
    alike: list[Statistics]
    ways: list[str]


def kernels(info: dict[str, Any]) -> str:
    """What decides, beside the bytes, how a row is rounded: runtime, CPU and options. The threads do not."""
    options = {name: info["options"][name] for name in KERNEL_OPTIONS if name in info["options"]}
    return f"{info['runtime_version']}; CPU {facts.fingerprint()}; {options}"


def vocabulary_of(runtime: RuntimeProcess) -> GoldenVocabulary:
    """The special tokens as the runtime itself reports them."""
    if runtime.info["runtime"] == "onnxruntime":
        return GoldenVocabulary()  # it knows tensors alone
    told = runtime.generation()
    ids = {name: told.get(name, -1) for name in ("bos", "eos")}
    return GoldenVocabulary(
        **{name: token if token is not None and token >= 0 else None for name, token in ids.items()},
        add_bos=told.get("adds_bos"),
        add_eos=told.get("adds_eos"),
        stop=sorted({int(token) for token in told["stops"]}),
    )


def make_golden(
    artifact: Artifact,
    model: Path,
    root: Path,
    folder: str,
    held_out_texts: Sequence[str],
    *,
    tokenizer_json: Path,
    threads: int,
    store: Store,
) -> Golden:
    """Run the shipped bytes `model` (file or folder), write the vectors to `root`/`folder`, describe them.

    Raises UserError where no prompt tells right from wrong, and for a chat template that is not the same everywhere;
    RuntimeCrashed where the runtime dies or disagrees with itself.
    """
    new_tokens = max(1, min(NEW_TOKENS, artifact.context_tokens // 2))
    # A prompt with a token doubled is one longer.
    room = min(MAX_PROMPT_TOKENS, artifact.context_tokens - new_tokens)
    parse_special = artifact.runtime == "onnxruntime-genai"  # it knows no other way
    threads = min(threads, len(facts.usable_cpus()))

    def opened(count: int, use_extra_bufts: bool | None) -> RuntimeProcess:
        return RuntimeProcess(
            artifact.runtime,
            model,
            threads=count,
            context_tokens=room + new_tokens,
            use_extra_bufts=use_extra_bufts,
            store=store,
        )

    with opened(threads, None) as runtime:
        info = runtime.info
        encode, plain = _encoders(artifact, runtime, tokenizer_json, parse_special)
        prompts = chosen(runtime, encode, plain, held_out_texts, room)
        if not prompts:
            raise UserError(
                f"the tokenizer of {model.name} gives no tokens for any text", "export it with its tokenizer"
            )
        cases = [_case(runtime, prompt, new_tokens) for prompt in prompts]
        vocabulary = vocabulary_of(runtime)
        chat = made_chat(runtime, tokenizer_json.parent)
    seen = _Seen([], [], [f"{threads} threads"])
    # Small batches in a single thread: more would only wait for each other where the machine is busy.
    other = 1 if threads > 1 else 2
    with opened(other, None) as runtime:
        _see_threads(runtime, cases, seen, other)
    if info["options"].get("use_extra_bufts"):
        with opened(threads, False) as runtime:
            seen.others.append(_compared(cases, [runtime.logits(case.batch) for case in cases]))
        seen.ways.append("without llama.cpp's extra buffers")
    judged, kept, records, damage_is_seen = _settled(artifact, model, cases, seen)
    said = fingerprint(artifact.format, model)
    if why := chat_differs(chat, tokenizer_json.parent, said.settings, model):
        raise UserError(f"{model.name}: {why}", "export the artifact again from this student")
    stems = [f"{folder}/{number:02d}" for number in range(len(kept))]
    return Golden(
        runtime=str(info["runtime"]),
        runtime_version=str(info["runtime_version"]),
        runtime_options=dict(info["options"]),
        kernels=kernels(info),
        tokenized_by="tokenizer.json" if artifact.runtime == "onnxruntime" else "artifact",
        add_special=True,
        parse_special=parse_special,
        context_tokens=room + new_tokens,
        new_tokens=new_tokens,
        vocab_size=int(info["vocab_size"]),
        outputs=judged,
        cases=[
            _write(root, stem, case, record, vocabulary.stop)
            for stem, case, record in zip(stems, kept, records, strict=True)
        ],
        damage_is_seen=damage_is_seen,
        vocabulary=vocabulary,
        chat=chat,
        settings=said.settings,
        weights=said.weights,
        seen_with=seen.ways,
    )


def _encoders(
    artifact: Artifact, runtime: RuntimeProcess, tokenizer_json: Path, parse_special: bool
) -> tuple[Encode, Encode]:
    """text → token ids, with the special tokens of a sequence's start and without."""
    if artifact.runtime != "onnxruntime":
        return (
            lambda text: runtime.tokenize(text, add_special=True, parse_special=parse_special),
            lambda text: runtime.tokenize(text, add_special=False, parse_special=parse_special),
        )
    from edgedistill.models.hf_tokenizer import open_tokenizer

    tokenizer = open_tokenizer(tokenizer_json)
    return (
        lambda text: list(tokenizer.encode(text).ids),
        lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids),
    )


def _case(runtime: RuntimeProcess, prompt: Prompt, new_tokens: int) -> _Case:
    greedy = runtime.greedy(prompt.tokens, new_tokens)
    logits_RV = runtime.logits([*prompt.tokens, *greedy])
    return _Case(prompt, greedy, compact(logits_RV), logits_RV[len(prompt.tokens) - 1].copy())


def _compared(cases: Sequence[_Case], found: Sequence[NDArray[np.float32]]) -> Statistics:
    return statistics([case.kept for case in cases], found)


def _see_threads(runtime: RuntimeProcess, cases: Sequence[_Case], seen: _Seen, threads: int) -> None:
    """The same batches in other threads, and the same rows in batches of other shapes."""
    batches = [runtime.logits(case.batch) for case in cases]
    seen.alike.append(_compared(cases, batches))
    seen.others.append(seen.alike[-1])
    tokens = [case.prompt.tokens for case in cases]
    whole = [runtime.logits(each) for each in tokens]
    seen.others.append(statistics([c.kept.part(0, len(t)) for c, t in zip(cases, tokens, strict=True)], whole))
    cut_rows, cut_found = [], []
    for case, each in zip(cases, tokens, strict=True):
        for cut in sorted({1, 2, 3, len(each) // 2, len(each) - 1} & set(range(1, len(each)))):
            cut_rows.append(case.kept.part(cut - 1, cut))
            cut_found.append(runtime.logits(each[:cut])[-1:])
    if cut_rows:
        seen.others.append(statistics(cut_rows, cut_found))
    # A token that is best one by one and not in a batch: one of the two logits is off by half of what it lacks.
    behind = max(
        _behind(case.greedy, logits[len(t) - 1 :]) for case, t, logits in zip(cases, tokens, batches, strict=True)
    )
    seen.others.append({**dict.fromkeys(seen.others[0], 0.0), "logits": behind / 2})
    seen.ways.append(
        f"{threads} thread{'s' * (threads > 1)}: the same batches, prompts alone, and prompts cut after 1, 2, 3, half "
        "and all but one of their tokens"
    )


def _behind(chosen_N: Sequence[int], logits_RV: NDArray[np.float32]) -> float:
    """By how much a token that was decoded alone lacks the best one of a batch, at most."""
    rows = logits_RV[: len(chosen_N)].astype(np.float64)
    return float((rows.max(axis=1) - rows[np.arange(len(chosen_N)), list(chosen_N)]).max())


def _judged(artifact: Artifact, model: Path, seen: _Seen, scale: float) -> list[GoldenOutput]:
    """The tolerances, or RuntimeCrashed where the ways differ too much for any."""
    largest, alike = largest_of(seen.others), largest_of(seen.alike)
    if why := too_much_seen(artifact.quantization, scale, largest, alike):
        raise RuntimeCrashed(
            f"{artifact.runtime} disagrees with itself on {model.name} between batch shapes or thread counts: {why[0]} "
            f"(the standard deviation of its logits is {scale:.3g})",
            f"install another build of {artifact.runtime}; this one computes wrong results on this CPU",
        )
    return outputs(artifact.quantization, scale, largest, alike)


def _settled(
    artifact: Artifact, model: Path, cases: Sequence[_Case], seen: _Seen
) -> tuple[list[GoldenOutput], list[_Case], list[dict[str, int]], DamageSeen]:
    """Tolerances and the cases that are kept by them: the scale is that of the kept, which is what a replay sees."""
    left = list(cases)
    while True:
        judged = _judged(artifact, model, seen, scale_of([case.last_V for case in left]))
        kept, records, damage_is_seen = _sure(artifact, left, judged)
        if len(kept) == len(left):
            return judged, kept, records, damage_is_seen
        texts = {case.prompt.text for case in kept}
        left = [case for case in left if case.prompt.text in texts]


def _sure(
    artifact: Artifact, cases: Sequence[_Case], judged: Sequence[GoldenOutput]
) -> tuple[list[_Case], list[dict[str, int]], DamageSeen]:
    """The cases that damaged tokens fail, what of each is compared, and where. UserError where that proves nothing."""
    logits = next(output for output in judged if output.name == "logits")
    rms = next(output.tolerance for output in judged if output.name == "rms")
    found = [_with_damage(case, logits.tolerance, rms) for case in cases]
    kept = [case for case in found if min(case.prompt.damaged.values()) > 1]
    seen: DamageSeen = "anywhere" if kept else "alike"
    least = least_damage(logits, seen)
    kept = kept or [case for case in found if min(case.prompt.damaged.values()) > least]
    if not kept:
        raise UserError(
            f"no golden vectors for {artifact.format}:{artifact.quantization}: prompts with damaged tokens give the "
            "same logits as whole ones",
            "the model does not look at its tokens: train it, or look at its retention",
        )
    total = sum(rows_compared(case.kept, logits.tolerance) for case in kept)
    if total < MIN_ROWS_COMPARED:
        raise UserError(
            f"no golden vectors for {artifact.format}:{artifact.quantization}: in {total} places a token leads the "
            f"others by more than twice the tolerance of {logits.tolerance:.3g}, and {MIN_ROWS_COMPARED} are the least",
            "the model prefers no token to others: train it, or give held-out text that it knows",
        )
    counts = [compared(case.kept, len(case.prompt.tokens), len(case.greedy), logits.tolerance) for case in kept]
    return kept, counts, seen


def _with_damage(case: _Case, tolerance: float, rms: float) -> _Case:
    """What damage does, in units of the tolerances: to the logits after the prompt, or to all rows where that is more.

    Of all rows for long prompts alone: these are there for positions, and one token hardly moves the last row.
    """
    damaged = {name: value / tolerance for name, value in case.prompt.damaged.items()}
    if len(case.prompt.tokens) >= LONG[0]:
        damaged = {name: max(value, case.prompt.moved[name] / rms) for name, value in damaged.items()}
    return replace(case, prompt=replace(case.prompt, damaged=damaged))


def rows_compared(kept: Compact, tolerance: float) -> int:
    """Rows of which some best id is known to stay behind, whatever tolerated difference there is."""
    return int((~kept.may_be_best(tolerance)).any(axis=1).sum())


def compared(kept: Compact, prompt_tokens: int, new_tokens: int, tolerance: float) -> dict[str, int]:
    """How many rows' best tokens are compared, and how many greedy tokens before the first that may turn."""
    sure_R = kept.margins_R > 2 * tolerance
    steps_N = sure_R[prompt_tokens - 1 : prompt_tokens - 1 + new_tokens]
    return {
        "tokens_compared": int(sure_R.sum()),
        "greedy_compared": new_tokens if steps_N.all() else int(np.argmin(steps_N)),
    }


def _write(root: Path, stem: str, case: _Case, counts: dict[str, int], stop: Sequence[int]) -> GoldenCase:
    parts = ("prompt.txt", "tokens.npy", "logits.npy", "greedy.npy", "ids.npy", "rows.npy")
    paths = {part.partition(".")[0]: f"{stem}.{part}" for part in parts}
    (root / stem).parent.mkdir(parents=True, exist_ok=True)
    (root / paths["prompt"]).write_bytes(case.prompt.text.encode("utf-8"))
    arrays = {
        "tokens": np.asarray(case.prompt.tokens, dtype="<i4"),
        "logits": case.last_V.astype("<f4"),
        "greedy": np.asarray(case.greedy, dtype="<i4"),
        "ids": case.kept.ids_RK.astype("<i4"),
        "rows": case.kept.rows.astype("<f4"),
    }
    for name, array in arrays.items():
        _save_array(root / paths[name], array)
    stops = [number for number, token in enumerate(case.greedy) if token in set(stop)]
    return GoldenCase(
        **paths,
        **counts,
        token_count=len(case.prompt.tokens),
        stops_after=stops[0] if stops else None,
        damaged=case.prompt.damaged,
    )


def _save_array(path: Path, array: NDArray[Any]) -> None:
    # Through memory: np.save straight to a full disk gives an error that does not say so.
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    path.write_bytes(buffer.getvalue())
