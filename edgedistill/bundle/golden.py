"""Golden vectors: prompts, their tokens, the logits and greedy text of the shipped bytes, and a tolerance.

T: tokens of a prompt, V: vocabulary. The tolerance is measured: the same logits are computed in every
way that this machine offers (whole prompts, prompts cut at several places, with more tokens behind,
other thread counts, with and without llama.cpp's extra buffers), and four times the largest difference
is let pass, or a floor where that is more, because other machines round in ways that this one cannot show.

The floor, in units of the logits' standard deviation over the vocabulary. Tried with llama.cpp on a Llama
of 21M parameters (6 layers, 512 wide), 200 tokens, x86-64 with AVX-512: leaving the 8-bit rounding of the
activations out altogether, more than any change of kernel does, moved a logit by at most 0.04 (Q8_0), 0.09
(Q4_K_M) and 0.12 (Q4_0); batches of another shape by 0.045; F16 sums by 0.0035. Another quantization of the
same weights is 0.5 and more away, a broken kernel several units. So 0.25 for quantized weights (ARM's
repacked dotprod and i8mm kernels, a GPU's, onnxruntime's), 0.02 for floating-point ones.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgedistill import machine
from edgedistill.bundle.manifest import BundleArtifact, Golden, GoldenCase, GoldenOutput
from edgedistill.errors import RuntimeCrashed, UserError
from edgedistill.records import Artifact
from edgedistill.runtimes.bounds import replay_of
from edgedistill.runtimes.child import RuntimeProcess
from edgedistill.runtimes.confine import layers_off
from edgedistill.store import Store

MULTIPLE_OF_SEEN = 4.0
FLOOR_QUANTIZED = 0.25
FLOOR_FLOAT = 0.02
FLOATS = ("F32", "F16", "BF16", "FP32")
# Where a runtime disagrees with itself by more than this (in the floor's units), no tolerance tells right from wrong.
MAX_SEEN = 0.5
NEW_TOKENS = 16
MAX_PROMPT_TOKENS = 128
REPLAY_THREADS = 4
SMALL_BYTES = 256 << 20
# Short, long, and what tokenizers get wrong; held-out text is what the model is for.
FIXED_TEXTS = ("The", "def add(a, b):\n    return a + b  # naïve café, 你好 🙂\t\tend\n")
EXCERPT_CHARS = (24, 120, 480)


@dataclass(frozen=True)
class Replayed:
    """A replay that passed. `largest_deviation` and `tolerance` are of the logits."""

    artifact: str
    runtime_version: str
    cases: int
    greedy_compared: int
    largest_deviation: float
    tolerance: float
    notes: list[str]


@dataclass
class _Case:
    text: str
    tokens: list[int]
    logits_TV: NDArray[np.float32]
    longer_TV: NDArray[np.float32]  # the same rows, with the continuation in the batch
    greedy: list[int]
    margins: NDArray[np.float64]  # of each greedy token over the runner-up


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

    Raises RuntimeCrashed where the runtime dies or disagrees with itself.
    """
    new_tokens = max(1, min(NEW_TOKENS, artifact.context_tokens // 2))
    room = min(MAX_PROMPT_TOKENS, artifact.context_tokens - new_tokens)
    context_tokens = room + new_tokens
    parse_special = artifact.runtime == "onnxruntime-genai"  # it knows no other way
    usable = len(machine.usable_cpus())
    threads = min(threads, usable)
    ways = [f"{threads} threads"]

    def opened(count: int, use_extra_bufts: bool | None) -> RuntimeProcess:
        return RuntimeProcess(
            artifact.runtime,
            model,
            threads=count,
            context_tokens=context_tokens,
            use_extra_bufts=use_extra_bufts,
            store=store,
        )

    with opened(threads, None) as runtime:
        info = runtime.info
        encode = _encoder(artifact, runtime, tokenizer_json, parse_special)
        fitted = [_fit(text, encode, room) for text in _prompts(held_out_texts)]
        firsts = [(text, tokens, runtime.logits(tokens)) for text, tokens in fitted if tokens]
    if not firsts:
        raise UserError(f"the tokenizer of {model.name} gives no tokens for any text", "export it with its tokenizer")
    # Small batches in a single thread: more would only wait for each other where the machine is busy.
    other = 1 if threads > 1 else 2
    with opened(other, None) as runtime:
        cases = [_continued(runtime, *first, new_tokens) for first in firsts]
        seen = max(
            max(
                _largest_cut(runtime, case.tokens, case.logits_TV),
                _largest(case.longer_TV, case.logits_TV),
                # A token that is best one by one and not in a batch: one of the two logits is off by half of that.
                float(-case.margins.min()) / 2,
            )
            for case in cases
        )
    ways.append(
        f"{other} thread{'s' * (other > 1)}: prompts cut after 1, 2, 3, half and all but one of their tokens, "
        "and with their continuation behind them in one batch"
    )
    if info["options"].get("use_extra_bufts"):
        with opened(threads, False) as runtime:
            seen = max(seen, *(_largest(runtime.logits(case.tokens), case.logits_TV) for case in cases))
        ways.append("without llama.cpp's extra buffers")
    logits = _logits_output(artifact, seen, float(np.mean([case.logits_TV[-1].std() for case in cases])))
    if not seen <= MAX_SEEN * (logits.scale or 0.0):
        raise RuntimeCrashed(
            f"{artifact.runtime} disagrees with itself on {model.name}: logits differ by {seen:.3g} between batch "
            f"shapes or thread counts, and their standard deviation is {logits.scale:.3g}",
            f"install another build of {artifact.runtime}; this one computes wrong results on this CPU",
        )
    return Golden(
        runtime=str(info["runtime"]),
        runtime_version=str(info["runtime_version"]),
        runtime_options=dict(info["options"]),
        tokenized_by="tokenizer.json" if artifact.runtime == "onnxruntime" else "artifact",
        add_special=True,
        parse_special=parse_special,
        context_tokens=context_tokens,
        new_tokens=new_tokens,
        vocab_size=int(info["vocab_size"]),
        outputs=[
            GoldenOutput(name="tokens", tolerance=0.0, largest_seen=0.0, derivation="token ids are equal or wrong"),
            logits,
            GoldenOutput(
                name="greedy",
                tolerance=0.0,
                largest_seen=0.0,
                derivation="ids are equal for as long as each leads the runner-up by more than the logits' tolerance; "
                "each id is within twice the tolerance of the best one of a whole batch",
            ),
        ],
        cases=[_write(root, f"{folder}/{number:02d}", case, logits.tolerance) for number, case in enumerate(cases)],
        seen_with=ways,
    )


def replay(root: Path, artifact: BundleArtifact, *, store: Store | None = None) -> Replayed:
    """Compute a bundle's golden vectors again on this machine and compare.

    Raises UserError naming the file, the deviation and the tolerance; and where the runtime is not
    installed. RuntimeCrashed where it dies.
    """
    golden = artifact.golden
    tolerance = next((output.tolerance for output in golden.outputs if output.name == "logits"), None)
    if tolerance is None:
        raise UserError(f"the golden vectors of {artifact.name} have no tolerance for logits", "make the bundle again")
    # A small model gains nothing from more threads, which on a busy machine wait for each other.
    threads = 1 if artifact.bytes < SMALL_BYTES else min(REPLAY_THREADS, len(machine.usable_cpus()))
    model = root / artifact.folder / artifact.entry
    largest = 0.0
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
        version = str(runtime.info["runtime_version"])
        if int(runtime.info["vocab_size"]) != golden.vocab_size:
            how = f"has {runtime.info['vocab_size']} tokens, not {golden.vocab_size}"
            raise _broken(artifact, version, "the vocabulary", how)
        for case in golden.cases:
            tokens = load_array(root / case.tokens, "<i4", (case.token_count,), what=case.tokens)
            if golden.tokenized_by == "artifact":
                text = _text(root / case.prompt, case.prompt)
                found = runtime.tokenize(text, add_special=golden.add_special, parse_special=golden.parse_special)
                if found != tokens.tolist():
                    how = f"the prompt's tokens are {found[:8]}…, not {tokens[:8].tolist()}…"
                    raise _broken(artifact, version, case.tokens, how)
            expected = load_array(root / case.logits, "<f4", (golden.vocab_size,), what=case.logits)
            greedy = load_array(root / case.greedy, "<i4", (golden.new_tokens,), what=case.greedy)
            found = runtime.greedy(tokens, golden.new_tokens)
            steps_NV = runtime.logits([*tokens.tolist(), *found])[len(tokens) - 1 : -1]
            apart = _largest(steps_NV[0], expected)
            if not apart <= tolerance:
                how = f"logits are off by {apart:.4g}, and {tolerance:.4g} is allowed"
                raise _broken(artifact, version, case.logits, how)
            largest = max(largest, apart)
            behind = float((steps_NV.max(axis=1) - steps_NV[np.arange(len(found)), found]).max())
            if not behind <= 2 * tolerance:
                how = f"a token decoded one by one is {behind:.4g} behind the best one of a whole batch"
                raise _broken(artifact, version, case.greedy, how)
            compared = greedy[: case.greedy_compared].tolist()
            if found[: len(compared)] != compared:
                how = f"the greedy continuation is {found[: len(compared)]}, not {compared}"
                raise _broken(artifact, version, case.greedy, how)
        notes = _replay_notes(artifact, runtime.info)
    return Replayed(
        artifact=artifact.name,
        runtime_version=version,
        cases=len(golden.cases),
        greedy_compared=sum(case.greedy_compared for case in golden.cases),
        largest_deviation=largest,
        tolerance=tolerance,
        notes=notes,
    )


def load_array(path: Path, dtype: str, shape: tuple[int, ...], *, what: str) -> NDArray[Any]:
    """A .npy file of exactly this type and shape, never a pickle.

    The header is compared before anything of the size that it claims is allocated. Raises UserError.
    """
    wanted = f"{dtype} {list(shape)}"
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            if version != (1, 0):
                raise ValueError(f"version {version} of the format")
            found_shape, fortran, found_dtype = np.lib.format.read_array_header_1_0(file)
            if (found_shape, fortran, found_dtype) != (shape, False, np.dtype(dtype)):
                raise ValueError(f"it holds {found_dtype.str} {list(found_shape)}, not {wanted}")
            data = file.read(math.prod(shape) * found_dtype.itemsize + 1)
        if len(data) != math.prod(shape) * found_dtype.itemsize:
            raise ValueError("it is cut short or too long")
    except (OSError, ValueError) as error:
        how = str(error)[:200]
        raise UserError(f"{what} is not a .npy file of {wanted}: {how}", "make the bundle again") from error
    return np.frombuffer(data, dtype=dtype).reshape(shape)


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
    if artifact.golden.tokenized_by != "artifact":
        notes.append(f"{artifact.name}: {artifact.runtime} holds no tokenizer: the tokens were taken as they are")
    return notes


def _text(path: Path, what: str) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{what} is not UTF-8: byte {error.start}", "make the bundle again") from error


def _prompts(held_out_texts: Sequence[str]) -> Iterator[str]:
    yield from FIXED_TEXTS
    texts = [text.strip() for text in held_out_texts if text.strip()]
    for text, chars in zip(texts[: len(EXCERPT_CHARS)], EXCERPT_CHARS, strict=False):
        yield text[:chars]


def _encoder(artifact: Artifact, runtime: RuntimeProcess, tokenizer_json: Path, parse_special: bool) -> Any:
    """text → token ids, special tokens of a sequence's start included."""
    if artifact.runtime != "onnxruntime":
        return lambda text: runtime.tokenize(text, add_special=True, parse_special=parse_special)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_json))
    return lambda text: list(tokenizer.encode(text).ids)


def _fit(text: str, encode: Any, room: int) -> tuple[str, list[int]]:
    """The text, shortened until its tokens have room."""
    tokens = encode(text)
    while len(tokens) > room:
        text = text[: len(text) // 2]
        tokens = encode(text) if text else []
    return text, tokens


def _largest_cut(runtime: RuntimeProcess, tokens: list[int], whole_TV: NDArray[np.float32]) -> float:
    """The largest difference between a prompt's logits and the last rows of shorter batches."""
    count = len(tokens)
    cuts = sorted({1, 2, 3, count // 2, count - 1} & set(range(1, count)))
    return max((_largest(runtime.logits(tokens[:cut])[-1], whole_TV[cut - 1]) for cut in cuts), default=0.0)


def _continued(
    runtime: RuntimeProcess, text: str, tokens: list[int], whole_TV: NDArray[np.float32], new_tokens: int
) -> _Case:
    """The greedy continuation, token by token, and its margins from one batch of prompt and continuation."""
    count = len(tokens)
    greedy = runtime.greedy(tokens, new_tokens)
    longer_TV = runtime.logits([*tokens, *greedy])
    steps_NV = longer_TV[count - 1 : count - 1 + new_tokens].astype(np.float64)
    chosen_N = steps_NV[np.arange(new_tokens), greedy]
    steps_NV[np.arange(new_tokens), greedy] = -np.inf
    return _Case(text, tokens, whole_TV, longer_TV[:count], greedy, chosen_N - steps_NV.max(axis=1))


def _largest(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """The largest absolute difference; infinite where either side is not finite, which no tolerance lets pass."""
    with np.errstate(invalid="ignore"):
        apart = float(np.abs(found.astype(np.float64) - expected).max())
    return apart if math.isfinite(apart) else math.inf


def _logits_output(artifact: Artifact, seen: float, scale: float) -> GoldenOutput:
    floor = FLOOR_FLOAT if artifact.quantization in FLOATS else FLOOR_QUANTIZED
    return GoldenOutput(
        name="logits",
        tolerance=max(MULTIPLE_OF_SEEN * seen, floor * scale) if math.isfinite(seen) else 0.0,
        largest_seen=seen if math.isfinite(seen) else 0.0,
        scale=scale,
        derivation=f"the larger of {MULTIPLE_OF_SEEN:g} × largest_seen and {floor:g} × scale; the floor is for "
        "instruction sets and GPUs that were not at hand: they sum in another order, which flips single roundings of "
        "activations, and these grow from layer to layer (ARM's repacked dotprod and i8mm kernels, for example)",
    )


def _write(root: Path, stem: str, case: _Case, tolerance: float) -> GoldenCase:
    """Write one case; its greedy ids count up to the first that a deviation let pass could turn."""
    sure = case.margins > tolerance
    compared = len(sure) if sure.all() else int(np.argmin(sure))
    paths = {part: f"{stem}.{part}" for part in ("prompt.txt", "tokens.npy", "logits.npy", "greedy.npy")}
    (root / stem).parent.mkdir(parents=True, exist_ok=True)
    (root / paths["prompt.txt"]).write_bytes(case.text.encode("utf-8"))
    _save_array(root / paths["tokens.npy"], np.asarray(case.tokens, dtype="<i4"))
    _save_array(root / paths["logits.npy"], case.logits_TV[-1].astype("<f4"))
    _save_array(root / paths["greedy.npy"], np.asarray(case.greedy, dtype="<i4"))
    return GoldenCase(
        prompt=paths["prompt.txt"],
        tokens=paths["tokens.npy"],
        logits=paths["logits.npy"],
        greedy=paths["greedy.npy"],
        token_count=len(case.tokens),
        greedy_compared=compared,
    )


def _save_array(path: Path, array: NDArray[Any]) -> None:
    # Through memory: np.save straight to a full disk gives an error that does not say so.
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    path.write_bytes(buffer.getvalue())
