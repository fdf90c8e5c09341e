"""Attention as ONNX Runtime's own operator: what transformers calls while a graph is traced.

A graph of MatMul, Softmax and masks has to be recognised again before a runtime can fuse it, and none of the usual
recognisers finds attention in what transformers 5 traces. So it is never taken apart: transformers' attention
interface is a function that emits com.microsoft::MultiHeadAttention, and the mask one that leaves [B, T] as it is.
Source: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MultiHeadAttention

Shapes: B batch, H heads, T queries, S keys, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NAME = "edgedistill_ort"
# What a masked score becomes; onnxruntime's own default, -10000, lets a large score shine through.
MASKED = -3.0e38


def ort_attention(
    module: Any,
    query_BHTD: Any,
    key_BHSD: Any,
    value_BHSD: Any,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Any = None,
    **_kwargs: Any,
) -> tuple[Any, None]:
    """softmax(q k^T scaling + bias + mask) v as [B, T, H, D].

    `attention_mask`: None, [B, S] of 0 and 1, or [B, 1|H, T, S], boolean or added; `position_bias`: [1|B, H, T, S].
    """
    import torch

    del dropout  # of training
    heads, head_size = query_BHTD.shape[1], query_BHTD.shape[3]
    groups = getattr(module, "num_key_value_groups", 1)
    if groups > 1:
        key_BHSD = key_BHSD.repeat_interleave(groups, dim=1)
        value_BHSD = value_BHSD.repeat_interleave(groups, dim=1)
    batch, queries = query_BHTD.shape[0], query_BHTD.shape[2]
    query = query_BHTD.transpose(1, 2).flatten(2)
    padding = bias = None
    if attention_mask is not None and attention_mask.dim() == 2:
        padding = attention_mask.to(torch.int32)
    elif attention_mask is not None:
        bias = attention_mask
        if bias.dtype == torch.bool:
            bias = (~bias).to(query.dtype) * MASKED
    if position_bias is not None:
        bias = position_bias if bias is None else bias + position_bias
    out = torch.onnx.ops.symbolic(
        "com.microsoft::MultiHeadAttention",
        [query, key_BHSD.transpose(1, 2).flatten(2), value_BHSD.transpose(1, 2).flatten(2), None, padding, bias],
        {
            "num_heads": heads,
            "scale": float(head_size**-0.5 if scaling is None else scaling),
            "mask_filter_value": MASKED,
        },
        dtype=query.dtype,
        shape=(batch, queries, heads * value_BHSD.shape[3]),
        version=1,
    )
    return out.reshape(batch, queries, heads, value_BHSD.shape[3]), None


def ort_mask(
    batch_size: Any, q_length: Any, kv_length: Any, attention_mask: Any = None, mask_function: Any = None, **kwargs: Any
) -> Any:
    """transformers' mask for `ort_attention`: the padding mask itself where every token sees every other."""
    from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

    if mask_function is bidirectional_mask_function:
        return attention_mask
    kwargs.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    return sdpa_mask(
        batch_size, q_length, kv_length, attention_mask=attention_mask, mask_function=mask_function, **kwargs
    )


@contextmanager
def fused_attention(model: Any) -> Iterator[bool]:
    """While it lasts, `model` traces to MultiHeadAttention; False where it does not use transformers' interface."""
    from transformers import AttentionInterface, AttentionMaskInterface

    if not getattr(model, "_supports_sdpa", False) or not hasattr(model, "set_attn_implementation"):
        yield False
        return
    AttentionInterface.register(NAME, ort_attention)
    AttentionMaskInterface.register(NAME, ort_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield True
    finally:
        model.set_attn_implementation(before)
