"""A checkpoint → the folder that onnxruntime-genai opens: the builder in a child process, its result held to torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgedistill.errors import RuntimeCrashed, UserError, did_you_mean
from edgedistill.models.architectures import TIED_HEAD, architecture_of, rope_of, tensor_map
from edgedistill.models.folder import require_sound
from edgedistill.models.generation import generation_of
from edgedistill.models.hf_tokenizer import no_tokenizer_json
from edgedistill.models.loading import without_run_settings
from edgedistill.models.shapes import refuse_family, shape_from_config
from edgedistill.models.weights import check_tensors, stored_tensors
from edgedistill.onnx.generation_settings import write_generation
from edgedistill.onnx.graph import count_types, stored_weights
from edgedistill.quantization.options import NOT_COMPARED
from edgedistill.records.artifact import Artifact, Fallback, Parity
from edgedistill.records.shape import Shape
from edgedistill.runtimes.child import signal_name
from edgedistill.runtimes.interpreter import module_command, users_path
from edgedistill.runtimes.process import RuntimeProcess
from edgedistill.store import combined_sha256, file_entries, versions
from edgedistill.strict import read_json

BLOCK_SIZE = 32
# 4: activations to INT8 before each product, which is what makes INT4 fast on ARM (dotprod, i8mm) and x86.
ACCURACY_LEVEL = 4
QUANTIZATIONS = ("FP32", "INT8", "INT4")
DECODED_TOKENS = 4
HEAD_MULTIPLE = 8
FUSED_ROPE_MULTIPLE = 16  # of the head size: GroupQueryAttention rotates no others
WRONG_ROPES = ("linear", "yarn")  # whose tables the builder leaves unscaled
BUILD_TIMEOUT_S = 6 * 3600.0
LOG_LINES_SHOWN = 6
TOKENIZER_FILE = "tokenizer.json"


def require_runnable(config: Mapping[str, Any], shape: Shape, *, where: str) -> None:
    """UserError for a head size that onnxruntime cannot run, and a rotary embedding that its builder writes wrongly."""
    refuse_family(shape, "onnx", where=where)
    rope_of(config, shape, where=where)
    written = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = written.get("rope_type", written.get("type", "default"))
    if kind in WRONG_ROPES:
        raise UserError(
            f"{where}: rope_type is {kind!r}, and onnxruntime-genai's builder (0.18) writes unscaled tables",
            "export as GGUF",
        )
    if shape.head_dim % HEAD_MULTIPLE:
        raise UserError(
            f"{where}: heads of {shape.head_dim}; onnxruntime's GroupQueryAttention takes multiples of {HEAD_MULTIPLE}",
            "export as GGUF, or train a student with another head_dim",
        )


def export_onnx(
    checkpoint: Path,
    out: Path,
    *,
    quantization: str,
    context_tokens: int,
    name: str,
    threads: int = 2,
    calibration: Sequence[Sequence[str]] | None = None,
    compare_logits: bool = True,
) -> Artifact:
    """Write model.onnx (+ .data), genai_config.json and the tokenizer into the folder `out`, and describe them.

    The same input gives the same bytes. `context_tokens` is capped at what the model was trained for; the
    rotary tables and genai_config.json hold that many. `calibration`: texts that the graph is held to torch on;
    `compare_logits` False: its weights alone are compared, and it decodes. Raises UserError for what cannot be
    exported faithfully, a graph whose logits are not torch's included; RuntimeCrashed where the builder dies. On
    failure `out` is as it was.
    """
    from edgedistill.onnx.decoder_parity import check_decoder, check_weights

    del name  # the folder says nothing about its name: equal models give equal bytes
    if quantization == "FP16":
        raise UserError(
            "onnxruntime-genai 0.18 cannot decode an FP16 graph on a CPU (it reuses a buffer of another shape)",
            "export with quantization FP32, INT8 or INT4",
        )
    if quantization not in QUANTIZATIONS:
        raise UserError(f"no ONNX quantization '{quantization}'", did_you_mean(quantization, QUANTIZATIONS))
    config, shape = _checked(checkpoint)
    context = min(context_tokens, shape.max_position_embeddings)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch_name:
        scratch = Path(scratch_name)
        staged = _stage(checkpoint, scratch / "checkpoint", config, context)
        separate_rope = shape.head_dim % FUSED_ROPE_MULTIPLE != 0
        _run_builder(
            checkpoint, staged, scratch, quantization=quantization, separate_rope=separate_rope, threads=threads
        )
        built = scratch / "out"
        # transformers rebuilds some tokenizers when it loads them; what ships is the original.
        shutil.copyfile(checkpoint / TOKENIZER_FILE, built / TOKENIZER_FILE)
        generation = generation_of(checkpoint, vocab_size=shape.vocab_size)
        notes = write_generation(built, generation, context)
        if compare_logits:
            parity = check_decoder(
                checkpoint, built, quantization=quantization, context_tokens=context, calibration=calibration,
                threads=threads,
            )  # fmt: skip
        else:
            parity = None
            check_weights(checkpoint, built)
            _decodes(built, context=context, threads=threads)
        artifact = _describe(built, shape, quantization=quantization, context=context, parity=parity)
        artifact = artifact.model_copy(update={"notes": [*artifact.notes, *notes]})
        out.mkdir(parents=True, exist_ok=True)
        for file in sorted(built.iterdir()):
            file.replace(out / file.name)
    return artifact


def _checked(checkpoint: Path) -> tuple[dict[str, Any], Shape]:
    """config.json and its shape, after the same checks of the weights as for GGUF."""
    where = str(checkpoint)
    stored = stored_tensors(checkpoint)
    config = read_json(checkpoint / "config.json", what="config.json")
    architecture = architecture_of(config, where=where)
    shape = shape_from_config(config, where=where)
    require_runnable(config, shape, where=where)
    expected = {k: s.shape for k, s in tensor_map(shape, architecture).items()}
    kept = {k: v for k, v in stored.items() if not k.endswith("inv_freq")}
    if shape.tie_word_embeddings:
        kept.pop(TIED_HEAD, None)
    check_tensors(kept, expected, where=where)
    if not (checkpoint / TOKENIZER_FILE).is_file():
        raise no_tokenizer_json(checkpoint)
    require_sound(checkpoint)
    return config, shape


def _stage(checkpoint: Path, staged: Path, config: Mapping[str, Any], context: int) -> Path:
    """The checkpoint as links, with a config.json of `context` positions: the builder sizes its tables by it, and
    loads the model as that says."""
    staged.mkdir()
    for file in checkpoint.iterdir():
        if file.is_file() and file.name != "config.json":
            (staged / file.name).symlink_to(file.resolve())
    changed = without_run_settings(config) | {"max_position_embeddings": context}
    (staged / "config.json").write_text(json.dumps(changed, indent=1), encoding="utf-8")
    return staged


def _run_builder(
    original: Path,
    staged: Path,
    scratch: Path,
    *,
    quantization: str,
    separate_rope: bool,
    threads: int,
) -> None:
    options = []
    if quantization in ("INT4", "INT8"):
        options = [f"int4_block_size={BLOCK_SIZE}", f"int4_accuracy_level={ACCURACY_LEVEL}"]
    if separate_rope:
        options.append("fuse_qkv=false")  # q and k must be apart to be rotated
    request = scratch / "request.json"
    request.write_text(
        json.dumps(
            {
                "checkpoint": str(staged.absolute()),
                "out": str((scratch / "out").absolute()),
                "cache": str((scratch / "cache").absolute()),
                "precision": quantization.lower(),
                "options": options,
                "separate_rope": separate_rope,
                "threads": threads,
            }
        ),
        encoding="utf-8",
    )
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": users_path(os.environ),
    }
    command = module_command("edgedistill.onnx.builder_child", str(request))
    log_path = scratch / "log.txt"
    with log_path.open("wb") as log:
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, timeout=BUILD_TIMEOUT_S,
                check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise RuntimeCrashed(
                f"the onnxruntime-genai builder did not finish {original} in {BUILD_TIMEOUT_S:g} s", "export as GGUF"
            ) from error
    if done.returncode != 0:
        lines = log_path.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").strip().splitlines()
        died = signal_name(done.returncode) if done.returncode < 0 else ""
        raise RuntimeCrashed(
            f"the onnxruntime-genai builder {f'died of {died}' if died else 'failed'} on {original}: "
            + " | ".join(line.strip()[:200] for line in lines[-LOG_LINES_SHOWN:]),
            "free memory if it was killed (SIGKILL), or export as GGUF",
            died,
        )


def _decodes(folder: Path, *, context: int, threads: int) -> None:
    """Let the runtime that ships decode a few tokens: a graph that it cannot run raises RuntimeCrashed here."""
    with RuntimeProcess("onnxruntime-genai", folder, threads=threads, context_tokens=context) as runtime:
        runtime.greedy([0, 1], min(DECODED_TOKENS, context - 2))


def _describe(folder: Path, shape: Shape, *, quantization: str, context: int, parity: Parity | None) -> Artifact:
    weights = stored_weights(folder)
    files = file_entries(folder)
    fallbacks = [
        Fallback(
            tensor=w.name,
            wanted=quantization,
            got=w.type,
            why=(
                "the builder has no INT8 embedding, and only INT4 where it is tied to the head"
                if w.is_embedding
                else "the builder left it in floating point"
            ),
        )
        for w in weights
        if quantization in ("INT4", "INT8") and w.rank > 1 and w.type != quantization
    ]
    return Artifact(
        format="onnx",
        quantization=quantization,
        runtime="onnxruntime-genai",
        entry=".",
        files=files,
        bytes=sum(f.bytes for f in files),
        sha256=combined_sha256(files),
        parameters=shape.parameters,
        bits_per_weight=8 * sum(w.bytes for w in weights) / shape.parameters,
        tensor_types=count_types(weights),
        fallbacks=fallbacks,
        context_tokens=context,
        vocab_size=shape.vocab_size,
        parity=parity,
        notes=[] if parity is not None else [NOT_COMPARED],
        tool_versions=versions("onnxruntime-genai", "onnxruntime", "onnx", "torch", "transformers"),
    )
