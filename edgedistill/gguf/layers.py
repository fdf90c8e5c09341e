"""A GGUF against its torch model: weights first, then logits, and where these depart, the first tensor that does.

Legend: T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch  # noqa: TID253  this module is imported by verification alone
from numpy.typing import NDArray

from edgedistill.errors import UserError
from edgedistill.gguf.dequantize import dequantized
from edgedistill.gguf.pooling import CLS, LAST, MEAN
from edgedistill.gguf.reader import GgufFile
from edgedistill.models.architectures import as_modules, model_of, to_interleaved
from edgedistill.models.weights import read_tensor, stored_tensors
from edgedistill.records.artifact import Parity
from edgedistill.runtimes.parity import INVALID, Differences, measure, real_inputs, weight_difference
from edgedistill.runtimes.process import RuntimeProcess
from edgedistill.runtimes.runners import with_weights
from edgedistill.store import Store
from edgedistill.strict import read_json

FLOAT_TYPES = ("F32", "F16", "BF16")
# Relative error of the logits against torch fp32 with the same stored weights. Float: F16 products and KV cache.
# Quantized: llama.cpp also rounds the activations, to 8 bits a block.
FLOAT_LIMIT = 0.02
QUANTIZED_LIMIT = 0.2

# llama.cpp's names of a layer's tensors, in the order of their computation → (the GGUF weight that makes it, whether
# the input of that weight's torch module is meant). Which module it is says the family's own table.
STAGES: tuple[tuple[str, str, bool], ...] = (
    ("attn_norm", "attn_norm", False),
    ("wqkv", "attn_qkv", False),
    ("Qcur", "attn_q", False),
    ("Kcur", "attn_k", False),
    ("Vcur", "attn_v", False),
    ("kqv_out", "attn_output", True),
    ("attn_out", "attn_output", False),
    ("attn_post_norm", "post_attention_norm", False),
    ("ffn_inp", "attn_output_norm", False),
    ("ffn_norm", "ffn_norm", False),
    ("ffn_gate", "ffn_gate", False),
    ("ffn_up", "ffn_up", False),
    ("ffn_out", "ffn_down", False),
    ("ffn_post_norm", "post_ffw_norm", False),
    ("l_out", "", False),
)
# Products that llama.cpp names before their bias is added
BEFORE_BIAS = ("wqkv", "ffn_gate", "ffn_up")
# Nodes with no weight of their own, or whose weight another node shows
WEIGHTLESS = ("kqv_out", "l_out")


def check_gguf(
    checkpoint: Path,
    gguf: Path,
    *,
    quantization: str,
    context_tokens: int,
    calibration: Sequence[Sequence[str]] | None = None,
    threads: int = 1,
    store: Store | None = None,
) -> Parity:
    """Hold a GGUF to the checkpoint that it was made of.

    Raises UserError where a stored weight is not the checkpoint's, or llama.cpp's logits are not torch's; the error
    names the first tensor that departs. RuntimeCrashed where llama.cpp dies.
    """
    family = model_of(read_json(checkpoint / "config.json", what="config.json"), where=str(checkpoint)).family
    embeds = family.task == "embedding"
    check_weights(checkpoint, gguf)
    name, sequences = real_inputs(checkpoint, calibration, context_tokens=context_tokens)
    limit = FLOAT_LIMIT if quantization in FLOAT_TYPES else QUANTIZED_LIMIT
    model = with_weights(checkpoint, dequantized(gguf), encoder=embeds)
    context = min(context_tokens, 2 * max(len(ids) for ids in sequences))
    with RuntimeProcess("llama.cpp", gguf, threads=threads, context_tokens=context, store=store) as process:
        parity = measure(
            model, sequences, inputs=name, reference="stored", runtime=str(process.info["runtime_version"]),
            limit=limit, context_tokens=context,
            logits=(lambda ids: process.embedding(ids)[None]) if embeds else process.logits,
            greedy=None if embeds else process.greedy,
            expected_of=(lambda encoder, ids: _torch_embedding(encoder, ids, _pooling(gguf))) if embeds else None,
        )  # fmt: skip
        if parity.relative_rms > limit:
            what = "embeddings" if embeds else "logits"
            raise UserError(
                f"{gguf.name}: llama.cpp's {what} differ from torch's by {parity.relative_rms:.3g} of their spread,"
                f" more than {limit:g}; {first_departure(model, checkpoint, process, sequences[0], limit)}",
                INVALID,
            )
    return parity


def check_weights(checkpoint: Path, gguf: Path) -> None:
    """Every stored tensor against the checkpoint's, one at a time, in the file's order.

    Raises UserError that names the first one whose scale, or what is left beside it, is no rounding.
    """
    model = model_of(read_json(checkpoint / "config.json", what="config.json"), where=str(checkpoint))
    stored = as_modules(stored_tensors(checkpoint), model.family)
    specs = model.specs
    types = _types(gguf)
    for name, values in dequantized(gguf):
        if name not in stored:
            continue  # a head that the quantizer made of a tied embedding
        original = read_tensor(stored[name])
        kind = types[specs[name].gguf_name]
        said = weight_difference(values, original, exact=kind in FLOAT_TYPES)
        if said:
            raise UserError(
                f"{gguf.name}: {specs[name].gguf_name} ({kind}) is not {name} of the checkpoint: {said}", INVALID
            )


def first_departure(
    model: Any, checkpoint: Path, process: RuntimeProcess, ids_T: NDArray[np.int64], limit: float
) -> str:
    """Which of llama.cpp's tensors, in the order of the computation, is the first to differ beyond `limit`."""
    expected = _torch_stages(model, checkpoint, ids_T)
    best: dict[str, float] = {}
    for name, flat in process.trace(ids_T, list(expected)):
        if flat.size != expected[name].size:
            continue
        differences = Differences()
        differences.add(flat.reshape(expected[name].shape), expected[name])
        # llama.cpp gives one name to a product, to the sum with its bias and to its rotation: one of them is torch's
        best[name] = min(best.get(name, float("inf")), differences.relative_rms)
    previous = "the embedding"
    for name in expected:
        if best.get(name, 0.0) > limit:
            stage, _, layer = name.partition("-")
            made_by = {stage: weight for stage, weight, _ in STAGES if stage not in WEIGHTLESS}
            weight = f" (blk.{layer}.{made_by[stage]}.weight)" if stage in made_by else ""
            return (
                f"the first tensor that departs is {name}{weight}, by {best[name]:.3g};"
                f" all before it, up to {previous}, agree"
            )
        if name in best:
            previous = name
    return f"no tensor before the logits departs by more than {limit:g}: the difference grows from layer to layer"


def _torch_stages(model: Any, checkpoint: Path, ids_T: NDArray[np.int64]) -> dict[str, NDArray[np.float32]]:
    """llama.cpp's name → [T, width] as torch computes it, in the order of the computation."""
    converted = model_of(read_json(checkpoint / "config.json", what="config.json"), where=str(checkpoint))
    family, sizes = converted.family, converted.sizes
    heads = {"Qcur": sizes.num_attention_heads, "Kcur": sizes.num_key_value_heads} if family.interleaved_rope else {}
    kept: dict[str, NDArray[np.float32]] = {}
    handles = []

    def keep(name: str, stage: str, of_input: bool) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            value = inputs[0] if of_input else output[0] if isinstance(output, tuple) else output
            if stage in BEFORE_BIAS and getattr(module, "bias", None) is not None:
                value = value - module.bias
            rows_TD = value.detach().float().cpu().numpy().reshape(len(ids_T), -1)
            if stage in heads:
                rows_TD = to_interleaved(np.ascontiguousarray(rows_TD.T), heads[stage]).T
            kept[name] = np.ascontiguousarray(rows_TD)

        return hook

    order = []
    modules = dict(model.named_modules())
    made_by = {tensor.gguf: name.rpartition(".")[0] for name, tensor in family.layer.items()}
    for layer in range(sizes.num_hidden_layers):
        prefix = family.layer_prefix.format(layer).removesuffix(".")
        for stage, weight, of_input in STAGES:
            inner = made_by.get(f"{weight}.weight") if weight else ""
            module = None if inner is None else modules.get(f"{prefix}.{inner}".removesuffix("."))
            if module is not None:
                order.append(f"{stage}-{layer}")
                handles.append(module.register_forward_hook(keep(order[-1], stage, of_input)))
    norm = next((name for name, tensor in family.last.items() if tensor.gguf == "output_norm.weight"), None)
    if norm is not None:
        order.append("result_norm")
        handles.append(modules[norm.rpartition(".")[0]].register_forward_hook(keep("result_norm", "", False)))
    try:
        with torch.no_grad():
            output = model(input_ids=torch.from_numpy(ids_T)[None].to(model.device))
    finally:
        for handle in handles:
            handle.remove()
    last, values = ("result_output", "logits") if family.task == "causal-lm" else ("result_embd", "last_hidden_state")
    order.append(last)
    kept[last] = np.ascontiguousarray(output[values][0].float().cpu().numpy())
    return {name: kept[name] for name in order if name in kept}


@torch.no_grad()
def _torch_embedding(model: Any, ids_T: NDArray[np.int64], pooling: int) -> NDArray[np.float32]:
    """[1, H]: the token vectors pooled as the GGUF says."""
    states_TH = model(input_ids=torch.from_numpy(ids_T)[None].to(model.device)).last_hidden_state[0]
    pooled = {MEAN: states_TH.mean(0), CLS: states_TH[0], LAST: states_TH[-1]}[pooling]
    return np.asarray(pooled.float().cpu().numpy())[None]


def _pooling(gguf: Path) -> int:
    reader = GgufFile(gguf)
    found = reader.value(f"{reader.value('general.architecture')}.pooling_type")
    if found is None:
        raise UserError(f"{gguf} says nothing of its pooling", "export it with this version of edgedistill")
    return int(found)


def _types(gguf: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in GgufFile(gguf).tensors}
