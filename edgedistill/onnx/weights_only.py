"""Weights of 8 or 4 bits in blocks beside float activations: MatMulNBits, and GatherBlockQuantized for tables.

Legend: K inputs of a product, N outputs.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgedistill.onnx.blocks import BLOCK_SIZE, matmul_nbits_stored
from edgedistill.onnx.qdq import split_attention
from edgedistill.onnx.quantizable import Quantizable
from edgedistill.onnx.rewriting import ORT_DOMAIN, Rewriter


def block_product(graph: Rewriter, node: Any, info: Quantizable, bits: int, *, accuracy_level: int) -> None:
    """MatMul, Gemm, or the projections of an Attention, with MatMulNBits in its place."""
    values = graph.weight(info.weight)
    rows_NK = np.ascontiguousarray(values if info.axis == 0 else values.T)
    outputs, columns = rows_NK.shape
    packed, scales, _ = matmul_nbits_stored(rows_NK, bits)
    weight = graph.constant(packed, f"{info.weight}_Q{bits}")
    scale = graph.constant(scales.reshape(-1), f"{info.weight}_Q{bits}_scales")
    attributes = {
        "K": columns, "N": outputs, "bits": bits, "block_size": BLOCK_SIZE, "accuracy_level": accuracy_level,
    }  # fmt: skip
    inputs = [info.input, weight, scale]
    if info.op_type == "Attention":
        product = graph.add(
            "MatMulNBits", inputs, graph.fresh(f"{info.output}_projected"), domain=ORT_DOMAIN, **attributes
        )
        split_attention(graph, node, product, outputs // 3, info.output)
        return
    bias = node.input[2] if len(node.input) > 2 else ""
    if bias:
        inputs += ["", "", bias]
    graph.add("MatMulNBits", inputs, info.output, like=node, domain=ORT_DOMAIN, **attributes)


def block_table(graph: Rewriter, node: Any, info: Quantizable) -> None:
    """An embedding of 4 bits in blocks of a row, which must have an even number of columns."""
    values = graph.weight(info.weight)
    packed, scales, _ = matmul_nbits_stored(values, 4)
    rows = packed.reshape(packed.shape[0], -1)[:, : values.shape[1] // 2]
    inputs = [
        graph.constant(rows, f"{info.weight}_Q4"),
        info.input,
        graph.constant(scales, f"{info.weight}_Q4_scales"),
    ]
    graph.add(
        "GatherBlockQuantized", inputs, info.output, like=node, domain=ORT_DOMAIN,
        bits=4, block_size=BLOCK_SIZE, gather_axis=0, quantize_axis=1,
    )  # fmt: skip
