"""An artifact's files against the folder of the model that they were made of, by reading them and asking the runtime.

`export` and `build` call it on what they wrote, `verify --student` on what it is given. What remains to be compared by
running the model, logits, is parity.py's.
"""

from __future__ import annotations

from pathlib import Path

from edgedistill.errors import UserError
from edgedistill.gguf.quantize import CONVERTER
from edgedistill.records.artifact import Artifact
from edgedistill.records.finding import Finding, require_none
from edgedistill.strict import read_json

REMEDY = "the artifact is not that model: export it again, or report this with the model's config.json"

__all__ = ["Finding", "check_faithful", "require_faithful"]


def check_faithful(artifact: Artifact, folder: Path, checkpoint: Path, *, run: bool = True) -> list[Finding]:
    """Everything in `folder` that differs from `checkpoint` by more than the artifact's quantization explains.

    Weights, the numbers that change what is computed, tokenizer, stop tokens, chat templates, context, settings of
    generation. `run`: an ONNX graph, which is a program, runs once beside the float32 model, which then stands in
    memory. Raises UserError where either cannot be read, RuntimeCrashed where the runtime dies.
    """
    if artifact.format == "gguf":
        return _gguf(artifact, folder, checkpoint)
    if artifact.runtime == "onnxruntime-genai":
        return _genai(artifact, folder, checkpoint, run=run)
    return _folder(artifact, folder, checkpoint)


def require_faithful(artifact: Artifact, folder: Path, checkpoint: Path, *, run: bool = True) -> None:
    """UserError that names what differs."""
    found = check_faithful(artifact, folder, checkpoint, run=run)
    require_none(found, f"{artifact.format}:{artifact.quantization} is not {checkpoint}", REMEDY)


def _gguf(artifact: Artifact, folder: Path, checkpoint: Path) -> list[Finding]:
    from edgedistill.gguf.convert import tokenizer_of
    from edgedistill.gguf.faithful import key_findings, tensor_findings
    from edgedistill.gguf.split import open_gguf
    from edgedistill.models.architectures import model_of
    from edgedistill.models.generation import generation_of
    from edgedistill.quantization.mixes import FILE_TYPES
    from edgedistill.runtimes.process import RuntimeProcess
    from edgedistill.verify.faithful_vocabulary import Vocabulary, vocabulary_findings

    entry = folder / artifact.entry
    config = read_json(checkpoint / "config.json", what="config.json")
    converted = CONVERTER in artifact.tool_versions
    readers = open_gguf(entry)
    found: list[Finding] = []
    said = readers[0].value("general.file_type")
    if said not in (FILE_TYPES[artifact.quantization], None if converted else FILE_TYPES[artifact.quantization]):
        found.append(
            Finding("metadata", "general.file_type", f"is {said}, and the artifact is {artifact.quantization}")
        )
    tokenizer = None
    try:
        model = model_of(config, where=str(checkpoint))
    except UserError:
        if not converted:
            raise
        model = None  # of a family that is not in the table: its script answers for its tensors
    if model is not None:
        found += key_findings(readers[0], model, checkpoint)
        weighted = artifact.calibration is not None
        found += tensor_findings(readers, model, checkpoint, quantization=artifact.quantization, weighted=weighted)
        try:
            tokenizer = tokenizer_of(checkpoint, model)
        except UserError:
            if not converted:
                raise
    generation = None
    if artifact.task == "causal-lm":
        _, tokens = readers[0].header.arrays.get("tokenizer.ggml.tokens", (0, 0))
        vocab_size = tokens if model is None else model.sizes.vocab_size
        generation = generation_of(checkpoint, vocab_size=vocab_size)
    with RuntimeProcess("llama.cpp", entry, threads=1, context_tokens=0, use_extra_bufts=False) as process:
        runtime = process.generation()
    found += vocabulary_findings(readers[0], Vocabulary(tokenizer, generation), runtime, converted=converted)
    return found


def _genai(artifact: Artifact, folder: Path, checkpoint: Path, *, run: bool) -> list[Finding]:
    from edgedistill.models.generation import generation_of
    from edgedistill.models.shapes import shape_from_config
    from edgedistill.onnx.faithful import config_findings, departures, file_findings, graph_findings, weight_findings
    from edgedistill.runtimes.process import RuntimeProcess

    entry = folder / artifact.entry
    config = read_json(checkpoint / "config.json", what="config.json")
    shape = shape_from_config(config, where=str(checkpoint))
    generation = generation_of(checkpoint, vocab_size=shape.vocab_size)
    with RuntimeProcess("onnxruntime-genai", entry, threads=1, context_tokens=32) as process:
        runtime = process.generation()
    found = [
        *config_findings(artifact, entry, checkpoint, generation, runtime),
        *file_findings(entry, checkpoint),
        *graph_findings(entry, config, shape, checkpoint),
        *weight_findings(checkpoint, entry, config, shape),
    ]
    # A graph is a program: that its weights and attributes are the model's does not say what it does with them.
    return found if found or not run else [*found, *departures(checkpoint, entry, config)]


def _folder(artifact: Artifact, folder: Path, checkpoint: Path) -> list[Finding]:
    """What other formats carry beside their graph or weights: the model's own tokenizer files, copied."""
    from edgedistill.onnx.faithful import file_findings

    found = list(file_findings(folder / artifact.entry if artifact.entry == "." else folder, checkpoint))
    if artifact.runtime == "transformers":
        from edgedistill.models.generation import generation_of

        kept, own = (generation_of(path, vocab_size=artifact.vocab_size) for path in (folder, checkpoint))
        if set(kept.stops) != set(own.stops):
            said = f"are {list(kept.stops)}, the model's are {list(own.stops)}"
            found.append(Finding("stops", "the stop tokens", said))
        if dict(kept.settings) != dict(own.settings):
            said = f"are {dict(kept.settings)}, the model's are {dict(own.settings)}"
            found.append(Finding("settings", "generation_config.json", said))
    return found
