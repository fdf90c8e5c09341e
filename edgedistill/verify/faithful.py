"""An artifact's files against the folder of the model that they were made of, by reading them and asking the runtime.

`export` and `build` call it on what they wrote, `verify --student` on what it is given. What remains to be compared by
running the model, logits, is parity.py's.
"""

from __future__ import annotations

from pathlib import Path

from edgedistill.errors import UserError
from edgedistill.gguf.quantize import CONVERTER
from edgedistill.records import Artifact
from edgedistill.strict import read_json
from edgedistill.verify.finding import Finding, require_none

REMEDY = "the artifact is not that model: export it again, or report this with the model's config.json"

__all__ = ["Finding", "check_faithful", "require_faithful"]


def check_faithful(artifact: Artifact, folder: Path, checkpoint: Path) -> list[Finding]:
    """Everything in `folder` that differs from `checkpoint` by more than the artifact's quantization explains.

    Weights, the numbers that change what is computed, tokenizer, stop tokens, chat templates, context, settings of
    generation. Raises UserError where either cannot be read, RuntimeCrashed where the runtime dies.
    """
    if artifact.format == "gguf":
        return _gguf(artifact, folder, checkpoint)
    return []


def require_faithful(artifact: Artifact, folder: Path, checkpoint: Path) -> None:
    """UserError that names what differs."""
    found = check_faithful(artifact, folder, checkpoint)
    require_none(found, f"{artifact.format}:{artifact.quantization} is not {checkpoint}", REMEDY)


def _gguf(artifact: Artifact, folder: Path, checkpoint: Path) -> list[Finding]:
    from edgedistill.generation import generation_of
    from edgedistill.gguf.architectures import model_of
    from edgedistill.gguf.convert import tokenizer_of
    from edgedistill.runtimes.child import RuntimeProcess
    from edgedistill.verify.faithful_gguf import key_findings, open_gguf, tensor_findings, value_of
    from edgedistill.verify.faithful_vocabulary import Vocabulary, vocabulary_findings

    entry = folder / artifact.entry
    config = read_json(checkpoint / "config.json", what="config.json")
    converted = CONVERTER in artifact.tool_versions
    readers = open_gguf(entry)
    found: list[Finding] = []
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
        tokens = value_of(readers[0], "tokenizer.ggml.tokens") or []
        vocab_size = len(tokens) if model is None else model.sizes.vocab_size
        generation = generation_of(checkpoint, vocab_size=vocab_size)
    with RuntimeProcess("llama.cpp", entry, threads=1, context_tokens=0, use_extra_bufts=False) as process:
        runtime = process.generation()
    found += vocabulary_findings(readers[0], Vocabulary(tokenizer, generation), runtime, converted=converted)
    return found
