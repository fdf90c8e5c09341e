"""A checkpoint → a folder with bitsandbytes' INT8 or NF4 layers, which transformers opens, for servers."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgedistill.errors import UserError, did_you_mean
from edgedistill.models.folder import require_sound
from edgedistill.models.shapes import refuse_family, shape_from_config
from edgedistill.records.artifact import Artifact
from edgedistill.store import combined_sha256, file_entries, fsync_tree, versions
from edgedistill.strict import read_json

PRECISIONS = {"INT8": "int8", "NF4": "nf4"}
# Relative error of the logits against torch fp32 with the stored weights: INT8 rounds the activations to 8 bits a
# row (values of 6 and more in 16 bits), NF4 computes in bfloat16. A wrong layout costs about 1.
LIMIT = 0.2
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def export_bitsandbytes(
    checkpoint: Path, out: Path, *, quantization: str, context_tokens: int, threads: int, calibration: Any = None
) -> Artifact:
    """Write config.json with its quantization_config, model.safetensors and the tokenizer into `out`.

    Raises UserError for an unknown quantization, a width that bitsandbytes computes wrongly, or logits that are not
    torch's; nothing is left in `out` on failure.
    """
    import torch

    from edgedistill.models.bitsandbytes import load_quantized
    from edgedistill.models.device import training_device
    from edgedistill.runtimes.parity import INVALID, measure, real_inputs
    from edgedistill.runtimes.process import RuntimeProcess
    from edgedistill.runtimes.runners import with_weights

    if quantization not in PRECISIONS:
        raise UserError(f"no bitsandbytes quantization '{quantization}'", did_you_mean(quantization, PRECISIONS))
    shape = shape_from_config(read_json(checkpoint / "config.json", what="config.json"), where=str(checkpoint))
    refuse_family(shape, "bitsandbytes", where=str(checkpoint))
    require_sound(checkpoint)
    context = min(context_tokens, shape.max_position_embeddings)
    name, sequences = real_inputs(checkpoint, calibration, context_tokens=context)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".bitsandbytes.", dir=out.parent) as scratch:
        made = Path(scratch) / "out"
        torch.set_num_threads(threads)
        model = load_quantized(checkpoint, PRECISIONS[quantization], training_device())
        model.save_pretrained(made)  # before any forward pass: the CPU's kernel lays the weights out anew in it
        del model
        for file in TOKENIZER_FILES:
            if (checkpoint / file).is_file():
                shutil.copyfile(checkpoint / file, made / file)
        with RuntimeProcess("transformers", made, threads=threads, context_tokens=context) as process:
            parity = measure(
                with_weights(checkpoint, dequantized(made)), sequences, logits=process.logits, greedy=process.greedy,
                runtime=str(process.info["runtime_version"]), inputs=name, reference="stored", limit=LIMIT,
                context_tokens=context,
            )  # fmt: skip
        if not parity.relative_rms <= LIMIT:
            raise UserError(
                f"{quantization}: bitsandbytes' logits differ by {parity.relative_rms:.3g} of the spread of torch's,"
                f" more than {LIMIT:g}",
                INVALID,
            )
        fsync_tree(made)
        for path in sorted(made.iterdir()):
            path.replace(out / path.name)
    files = file_entries(out)
    counts = _stored_types(out)
    size = sum(file.bytes for file in files if file.path.endswith(".safetensors"))
    return Artifact(
        format="bitsandbytes", quantization=quantization, runtime="transformers", entry=".", files=files,
        bytes=sum(file.bytes for file in files), sha256=combined_sha256(files), parameters=shape.parameters,
        bits_per_weight=8 * size / shape.parameters, tensor_types=dict(sorted(counts.items())),
        context_tokens=context, vocab_size=shape.vocab_size, parity=parity,
        tool_versions=versions("bitsandbytes", "torch", "transformers"),
    )  # fmt: skip


def dequantized(folder: Path) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """(transformers name, float32 values) of every stored weight; a tied head is not repeated."""
    import bitsandbytes
    import torch

    from edgedistill.models.bitsandbytes import open_folder

    model = open_folder(folder)
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        module = modules[name.rpartition(".")[0]]
        weight = name.endswith(".weight")
        if weight and isinstance(module, bitsandbytes.nn.Linear4bit):
            values = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif weight and isinstance(module, bitsandbytes.nn.Linear8bitLt):
            # CB: rows of int8, SCB: the largest magnitude of each row (Dettmers et al. 2022)
            stored, scale = module.weight.CB, module.weight.SCB
            values = (stored if stored is not None else module.weight.data).float() * (scale.float()[:, None] / 127)
        else:
            values = parameter.data
        yield name, values.to(torch.float32).cpu().numpy()


def _stored_types(folder: Path) -> Counter[str]:
    """How many tensors of each safetensors type, the scales and tables of the quantizer included."""
    from safetensors import safe_open

    counts: Counter[str] = Counter()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            counts.update(str(file.get_slice(name).get_dtype()) for name in file.keys())  # noqa: SIM118  no mapping
    return counts
