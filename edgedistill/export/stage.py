"""The export stage: a checkpoint → the artifact, in the store, or a folder of the user's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgedistill import statistics
from edgedistill.config.recipe import Export
from edgedistill.config.refusals import refuse_mixed_format
from edgedistill.config.targets import parse_artifact
from edgedistill.errors import UserError
from edgedistill.gguf.pretokenizers import NEW_CHARACTERS_NOTE
from edgedistill.machine import facts
from edgedistill.models.folder import folder_notes, require_weights
from edgedistill.models.generation import generation_sha256
from edgedistill.progress import QUIET, Progress
from edgedistill.quantization.options import DEFAULT_OPTIONS, NOT_COMPARED, UNKNOWN_FAMILY, ExportOptions
from edgedistill.records.artifact import Artifact
from edgedistill.store import Store, Stored, Work, versions

FLOAT_FILE = ".float.gguf"  # beside the artifact while that is checked and timed
EXPORTERS = {
    "gguf": ("gguf", "llama-cpp-python"),
    "onnx": ("onnxruntime-genai", "onnxruntime", "onnx", "onnx-ir", "torch", "transformers", "tokenizers"),
    "bitsandbytes": ("bitsandbytes", "torch", "transformers"),
    "executorch": ("executorch", "torch", "transformers"),
}


def options_of(settings: Export, calibration: list[list[str]] | None, source: str, seed: int) -> ExportOptions:
    """A recipe's `export` section, with the text that calibration sees."""
    return ExportOptions(
        calibration=None if calibration is None else tuple(tuple(block) for block in calibration),
        calibration_source=source,
        calibration_samples=settings.calibration_samples,
        calibration_tokens=settings.calibration_tokens,
        calibration_batch=settings.calibration_batch,
        calibration_method=settings.calibration_method,
        int8_scheme=settings.int8_scheme,
        seed=seed,
        importance_matrix=settings.importance_matrix,
        tensor_types=tuple(settings.tensor_types.items()),
        mixed_retention=settings.mixed_retention,
        max_file_bytes=settings.max_file_bytes,
        opset=settings.opset,
        ort_format=settings.ort_format,
        tensorrt=settings.tensorrt,
        compare_logits=settings.compare_logits,
        compare_speed=settings.compare_speed,
    )


def export_model(
    checkpoint: Path,
    artifact: str,
    *,
    context_tokens: int,
    name: str,
    weights_sha256: str,
    tokenizer_sha256: str,
    store: Store,
    options: ExportOptions = DEFAULT_OPTIONS,
    progress: Progress = QUIET,
) -> Stored[Artifact]:
    """`artifact` ("gguf:Q4_K_M", "onnx:INT4") of a transformers folder, found in the store or written there.

    Raises UserError where the model cannot be converted, RuntimeCrashed where a converter dies.
    """
    format_, quantization = parse_artifact(artifact)
    inputs: dict[str, Any] = {
        "artifact": artifact,
        "weights": weights_sha256,
        "tokenizer": tokenizer_sha256,
        "generation": generation_sha256(checkpoint),
        "context_tokens": context_tokens,
        "name": name,
        "options": options.key(),
        "intervals": statistics.METHOD,
        "versions": versions("edgedistill", *EXPORTERS[format_]),
    }

    def write(work: Work) -> Artifact:
        progress.say(f"export: {artifact}")
        require_weights(checkpoint, weights_sha256, store, role="student")
        made = write_artifact(
            checkpoint, work.out, format_=format_, quantization=quantization, context_tokens=context_tokens, name=name,
            options=options, store=store, progress=progress,
        )  # fmt: skip
        require_weights(checkpoint, weights_sha256, store, role="student")
        return made.model_copy(update={"notes": [*made.notes, *options.notes]})

    stored = store.run("export", inputs, write, Artifact, progress.say)
    made = stored.result
    progress.say(
        f"export: {artifact} has {made.bytes:,} bytes, {made.bits_per_weight:.2f} bits a weight"
        f"{' (from the store)' if stored.reused else ''}"
    )
    tell_notes(made, progress)
    if made.fallbacks:
        first = made.fallbacks[0]
        progress.say(
            f"export: {len(made.fallbacks)} tensors got another type than asked, e.g. {first.tensor}:"
            f" {first.got} instead of {first.wanted}, because {first.why}"
        )
    return stored


def tell_notes(made: Artifact, progress: Progress) -> None:
    """Say where the artifact is known to differ from the original, as a warning."""
    for note in made.notes:
        # True of every byte-level BPE, and of scripts that few texts hold: no reason to look up.
        tell = progress.say if note == NEW_CHARACTERS_NOTE else progress.warn
        tell(f"export: {made.format}:{made.quantization}: {note}")


def write_artifact(
    checkpoint: Path,
    out: Path,
    *,
    format_: str,
    quantization: str,
    context_tokens: int,
    name: str,
    options: ExportOptions = DEFAULT_OPTIONS,
    checked: bool = True,
    store: Store | None = None,
    progress: Progress = QUIET,
) -> Artifact:
    """Write the artifact into `out`, which must be empty or new, and hold it to the checkpoint.

    What is written is read back: weights and the numbers that a computation depends on, tokenizer, stop tokens, chat
    templates, context and settings must be the checkpoint's (verify/faithful.py), then its logits in its runtime.
    `checked=False` leaves all that out, and the timing: for an artifact that is read back and thrown away. Raises
    UserError before any work where the comparison would not fit this machine's memory, and after it for what differs.
    """
    unquantized = out / FLOAT_FILE if checked and options.compare_speed else None
    try:
        made = _written(
            checkpoint, out, format_=format_, quantization=quantization, context_tokens=context_tokens, name=name,
            options=options, compared=checked and options.compare_logits, unquantized=unquantized, progress=progress,
        )  # fmt: skip
        if not checked:
            return made
        return _checked(made, checkpoint, out, options=options, unquantized=unquantized, store=store, progress=progress)
    finally:
        if unquantized is not None:
            unquantized.unlink(missing_ok=True)


def _checked(
    made: Artifact,
    checkpoint: Path,
    out: Path,
    *,
    options: ExportOptions,
    unquantized: Path | None,
    store: Store | None,
    progress: Progress,
) -> Artifact:
    """The artifact held to the checkpoint, with its notes, its parity and its speed."""
    from edgedistill.verify.faithful import require_faithful
    from edgedistill.verify.tokenizer_check import with_checked_tokenizer

    # Keys and tensors first: they name what is wrong, where tokens and logits show that something is.
    require_faithful(made, out, checkpoint, run=options.compare_logits)
    made = made.model_copy(update={"notes": [*made.notes, *folder_notes(checkpoint)]})
    made = with_checked_tokenizer(made, out, checkpoint)
    threads = max(1, len(facts.usable_cpus()))
    if made.format == "gguf":
        made = _compared_gguf(made, checkpoint, out, options=options, threads=threads, progress=progress)
        made = _timed_gguf(made, unquantized, out / made.entry, threads=threads, progress=progress)
    _runs(made, out, store)
    return made


def _written(
    checkpoint: Path,
    out: Path,
    *,
    format_: str,
    quantization: str,
    context_tokens: int,
    name: str,
    options: ExportOptions,
    compared: bool,
    unquantized: Path | None,
    progress: Progress,
) -> Artifact:
    """The artifact as its format's exporter leaves it; of a GGUF also what was quantized, kept as `unquantized`."""
    threads = max(1, len(facts.usable_cpus()))
    if options.mixed_retention is not None:
        decoder = format_ != "onnx" or is_decoder(checkpoint, options.task)
        refuse_mixed_format(format_, quantization, decoder=decoder)
    if options.tensorrt and (format_ != "onnx" or is_decoder(checkpoint, options.task)):
        raise UserError(
            f"export.tensorrt is true, and {format_}:{quantization} of {checkpoint} has operators that TensorRT lacks",
            "set export.tensorrt=false; a Jetson runs decoders as GGUF",
        )
    if format_ == "gguf":
        from edgedistill.gguf.quantize import export_gguf

        if compared:
            _require_memory(checkpoint, 4 if quantization == "F32" else 2)
        return export_gguf(
            checkpoint, out, quantization=quantization, context_tokens=context_tokens, threads=threads, name=name,
            options=options, unquantized=unquantized, progress=progress,
        )  # fmt: skip
    if format_ == "onnx" and not is_decoder(checkpoint, options.task):
        from edgedistill.onnx.encoder import export_encoder

        made = export_encoder(
            checkpoint, out, quantization=quantization, context_tokens=context_tokens, threads=threads,
            options=options, progress=progress,
        )  # fmt: skip
        _say_parity(made, "onnxruntime", progress)
        return made
    if format_ == "onnx":
        from edgedistill.onnx.decoder import export_onnx

        if compared:
            _require_memory(checkpoint, 4)
        made = export_onnx(
            checkpoint, out, quantization=quantization, context_tokens=context_tokens, name=name, threads=threads,
            calibration=options.calibration, compare_logits=compared,
        )  # fmt: skip
        _say_parity(made, "onnxruntime-genai", progress)
        return made
    if format_ == "executorch":
        from edgedistill.other_formats.executorch import export_executorch

        return export_executorch(
            checkpoint, out, quantization=quantization, context_tokens=context_tokens, threads=threads,
            calibration=options.calibration,
        )  # fmt: skip
    if format_ == "bitsandbytes":
        from edgedistill.other_formats.bitsandbytes import export_bitsandbytes

        return export_bitsandbytes(
            checkpoint, out, quantization=quantization, context_tokens=context_tokens, threads=threads,
            calibration=options.calibration,
        )  # fmt: skip
    raise UserError(f"no format '{format_}'", "use gguf, onnx, bitsandbytes or executorch")


def _compared_gguf(
    made: Artifact, checkpoint: Path, out: Path, *, options: ExportOptions, threads: int, progress: Progress
) -> Artifact:
    """The artifact with its parity, which is an error beyond its limit; none for a family that is not in the table."""
    from edgedistill.gguf.layers import check_gguf

    if not in_table(checkpoint):
        return made.model_copy(update={"notes": [*made.notes, UNKNOWN_FAMILY]})
    if not options.compare_logits:
        return made.model_copy(update={"notes": [*made.notes, NOT_COMPARED]})
    parity = check_gguf(
        checkpoint, out / made.entry, quantization=made.quantization, context_tokens=made.context_tokens,
        calibration=options.calibration, threads=threads,
    )  # fmt: skip
    made = made.model_copy(update={"parity": parity})
    _say_parity(made, "llama.cpp", progress)
    return made


def in_table(checkpoint: Path) -> bool:
    """Whether the GGUF table has the model's family; where not, the user's own converter answers for its tensors."""
    from edgedistill.models.architectures import model_of
    from edgedistill.strict import read_json

    try:
        model_of(read_json(checkpoint / "config.json", what="config.json"), where=str(checkpoint))
    except UserError:
        return False
    return True


def _runs(made: Artifact, folder: Path, store: Store | None) -> None:
    """Let the runtime that ships run a token of what was not compared in it."""
    if made.parity is not None:
        return
    from edgedistill.runtimes.process import RuntimeProcess

    with RuntimeProcess(
        made.runtime, folder / made.entry, threads=len(facts.usable_cpus()), context_tokens=32, store=store,
        logits_all=False,
    ) as process:  # fmt: skip
        tokens = [0, min(1, made.vocab_size - 1)]
        if made.task == "embedding":
            process.embedding(tokens)
        else:
            process.greedy(tokens, 2)


def _say_parity(made: Artifact, runtime: str, progress: Progress) -> None:
    parity = made.parity
    if parity is None:
        return
    what, greedy = "embeddings" if made.format == "gguf" else "outputs", ""
    if parity.greedy_tokens is not None:
        what = "logits" if made.task == "causal-lm" else "outputs"
        compared = parity.greedy_tokens if parity.greedy_compared is None else parity.greedy_compared
        greedy = f"; greedy text equal for {parity.greedy_tokens_equal} of {compared} tokens"
        if compared < parity.greedy_tokens:
            greedy += f" ({parity.greedy_tokens - compared} more are a toss between two logits)"
    progress.say(
        f"export: {runtime}'s {what} are torch's within {parity.relative_rms:.2g} of their spread (limit"
        f" {parity.limit:g}){greedy}"
    )


def _require_memory(checkpoint: Path, artifact_bytes_a_weight: int) -> None:
    """UserError where the float32 model in torch, beside the artifact in its runtime, would not fit what is free."""
    from edgedistill.fit.artifact import human_bytes
    from edgedistill.models.weights import stored_tensors

    tensors = stored_tensors(checkpoint).values()
    # A tensor of the artifact's passes through two copies on its way into the model.
    largest = 2 * 4 * max((tensor.elements for tensor in tensors), default=0)
    needed = largest + (4 + artifact_bytes_a_weight) * sum(tensor.elements for tensor in tensors)
    free = facts.available_bytes()
    if free is not None and needed > free:
        raise UserError(
            f"comparing the artifact's logits with torch's takes about {human_bytes(needed)} of memory, and"
            f" {human_bytes(free)} are free",
            "free some, or compare only its weights with --set export.compare_logits=false",
        )


def _timed_gguf(made: Artifact, unquantized: Path | None, entry: Path, *, threads: int, progress: Progress) -> Artifact:
    """The artifact with its speed against F16's, which it was quantized from; as it is where no F16 was kept."""
    from edgedistill.quantization.mixes import UNQUANTIZED
    from edgedistill.runtimes.speed import compare_decoders, report

    if unquantized is None or made.quantization in UNQUANTIZED or made.task != "causal-lm":
        return made
    found = compare_decoders(
        unquantized, entry, runtime="llama.cpp", vocab_size=made.vocab_size, context_tokens=made.context_tokens,
        threads=threads,
    )  # fmt: skip
    report(found, made.quantization, progress)
    return made.model_copy(update={"speed": found})


def is_decoder(checkpoint: Path, task: str | None) -> bool:
    """Whether the decoder's exporter takes a folder: by its config, unless `task` says what it does."""
    from edgedistill.onnx.tasks import task_of

    return task_of(checkpoint, task) == "causal-lm"
