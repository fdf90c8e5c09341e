"""Child process of the ONNX export: the onnxruntime-genai builder, then the torch model's logits to hold it to.

`python -m edgedistill.onnx.builder_child REQUEST.json`. In one process, because both need torch, and in
one of its own, so that a builder that dies or runs out of memory does not take the build with it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np


def build(checkpoint: Path, out: Path, cache: Path, precision: str, options: list[str], *, separate_rope: bool) -> None:
    """Write the onnxruntime-genai folder `out` of a transformers folder.

    `separate_rope`: rotary embedding as a node of its own instead of inside GroupQueryAttention, which
    refuses head sizes that are no multiple of 16 when it has to rotate them. The builder has no option for it.
    """
    # Its modules import each other as top-level ones; importing the package puts its folder on sys.path.
    from onnxruntime_genai.models import builder

    if separate_rope:
        builder.Model.is_fused_rope_supported = lambda _self: False
    prepared = builder.parse_extra_options("", str(checkpoint), str(out), precision, "cpu", str(cache), options)
    builder.create_model("", str(checkpoint), str(out), precision, "cpu", str(cache), **prepared)


def reference_logits(checkpoint: Path, built: Path, tokens: list[int], out: Path, *, quantized: bool) -> None:
    """The torch model's logits, [T, V] float32, saved as .npy; `quantized`: with the weights as `built` stores them.

    So that a graph that computes something else is told from what the quantization costs.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from edgedistill.onnx.dequantize import dequantized

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True).eval()
    if quantized:
        config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        with torch.inference_mode():
            for name, values in dequantized(built, config):
                if name == "lm_head.weight":  # stored apart from the embedding, so no longer tied to it
                    model.lm_head.weight = torch.nn.Parameter(torch.from_numpy(values), requires_grad=False)
                else:
                    model.get_parameter(name).copy_(torch.from_numpy(values))
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([tokens])).logits[0]
    np.save(out, logits.float().numpy(), allow_pickle=False)


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    import torch

    torch.set_num_threads(int(request["threads"]))
    build(
        Path(request["checkpoint"]),
        Path(request["out"]),
        Path(request["cache"]),
        request["precision"],
        request["options"],
        separate_rope=bool(request["separate_rope"]),
    )
    reference_logits(
        Path(request["original"]),
        Path(request["out"]),
        request["tokens"],
        Path(request["reference"]),
        quantized=request["precision"].startswith("int"),
    )


if __name__ == "__main__":
    main()
