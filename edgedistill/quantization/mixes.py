"""Which ggml type llama.cpp gives each matrix of a mix, computed from names and widths alone.

A mix (Q4_K_M, IQ3_XS, ...) is a base type and exceptions to it, which depend on the matrix's part of the network, its
layer, the heads that share keys, whether the head is tied, and whether an importance matrix is given. The rules are
those of llama.cpp's src/llama-quant.cpp for dense models; tests/fit/test_sizes.py holds them to files that it wrote.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from edgedistill.errors import UserError, did_you_mean

# type -> (weights a block, bytes a block), as in ggml
GGML_BLOCKS = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "Q8_0": (32, 34),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "IQ4_NL": (32, 18),
    "Q6_K": (256, 210),
    "Q5_K": (256, 176),
    "Q4_K": (256, 144),
    "IQ4_XS": (256, 136),
    "Q3_K": (256, 110),
    "IQ3_S": (256, 110),
    "IQ3_XXS": (256, 98),
    "Q2_K": (256, 84),
    "IQ2_S": (256, 82),
    "IQ2_XS": (256, 74),
    "IQ2_XXS": (256, 66),
    "IQ1_M": (256, 56),
    "IQ1_S": (256, 50),
}
UNQUANTIZED = ("F32", "F16", "BF16")
# Mix -> the type that most of its matrices get; all that llama.cpp and this package offer.
BASE_TYPES = {
    "F32": "F32",
    "F16": "F16",
    "BF16": "BF16",
    "Q8_0": "Q8_0",
    "Q6_K": "Q6_K",
    "Q5_K_M": "Q5_K",
    "Q5_K_S": "Q5_K",
    "Q5_1": "Q5_1",
    "Q5_0": "Q5_0",
    "Q4_K_M": "Q4_K",
    "Q4_K_S": "Q4_K",
    "Q4_1": "Q4_1",
    "Q4_0": "Q4_0",
    "IQ4_NL": "IQ4_NL",
    "IQ4_XS": "IQ4_XS",
    "Q3_K_L": "Q3_K",
    "Q3_K_M": "Q3_K",
    "Q3_K_S": "Q3_K",
    "IQ3_M": "IQ3_S",
    "IQ3_S": "IQ3_S",
    "IQ3_XS": "IQ3_S",
    "IQ3_XXS": "IQ3_XXS",
    "Q2_K": "Q2_K",
    "Q2_K_S": "Q2_K",
    "IQ2_M": "IQ2_S",
    "IQ2_S": "IQ2_XS",
    "IQ2_XS": "IQ2_XS",
    "IQ2_XXS": "IQ2_XXS",
    "IQ1_M": "IQ1_M",
    "IQ1_S": "IQ1_S",
}
# What llama.cpp takes where a row is not a multiple of 256; of 32: F16.
FALLBACK = {
    "Q6_K": "Q8_0",
    "Q5_K": "Q5_1",
    "Q4_K": "Q5_0",
    "Q3_K": "Q4_0",
    "Q2_K": "Q4_0",
    "IQ4_XS": "IQ4_NL",
    "IQ3_S": "IQ4_NL",
    "IQ3_XXS": "IQ4_NL",
    "IQ2_S": "IQ4_NL",
    "IQ2_XS": "IQ4_NL",
    "IQ2_XXS": "IQ4_NL",
    "IQ1_M": "IQ4_NL",
    "IQ1_S": "IQ4_NL",
}
# Types that llama.cpp does not write without an importance matrix (but for the embedding and the head).
NEED_IMPORTANCE = frozenset({"IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"})
# Mixes that hold such types, or (Q2_K_S) that llama.cpp treats as if they did.
MIXES_THAT_NEED_IMPORTANCE = frozenset(
    {"IQ3_XS", "IQ3_XXS", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"}
)
# Mixes for which benchmarks/quantization.py finds that a matrix helps: `export.importance_matrix: auto`.
HELPED_BY_IMPORTANCE = frozenset(
    {
        "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS", "Q3_K_L", "Q3_K_M",
        "Q3_K_S", "IQ3_M", "IQ3_S", "Q2_K",
    }
)  # fmt: skip
VERY_LOW = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ1_S", "IQ1_M")
IQ2_LARGER = ("IQ2_S", "IQ2_M")
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
# Matrices that llama.cpp leaves as they are: norms, positions, token types, relative positions, expert gates.
# general.file_type, as llama.cpp numbers its mixes
FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K_S": 11, "Q3_K_M": 12,
    "Q3_K_L": 13, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18, "IQ2_XXS": 19, "IQ2_XS": 20,
    "Q2_K_S": 21, "IQ3_XS": 22, "IQ3_XXS": 23, "IQ1_S": 24, "IQ4_NL": 25, "IQ3_S": 26, "IQ3_M": 27, "IQ2_S": 28,
    "IQ2_M": 29, "IQ4_XS": 30, "IQ1_M": 31, "BF16": 32,
}  # fmt: skip
NEVER_QUANTIZED = re.compile(r"_norm\.weight$|^position_embd\.|^token_types\.|ffn_gate_inp\.|attn_rel_b\.")
LAYER = re.compile(r"^blk\.(\d+)\.")
GROUPED = 4  # from so many heads a key on, values are few, and more bits for them are cheap
LAYERS_OF_70B = 80


def quantizable(name: str, dimensions: int) -> bool:
    """Whether llama.cpp quantizes a tensor of this GGUF name at all."""
    return dimensions > 1 and name.endswith("weight") and not NEVER_QUANTIZED.search(name)


def usable_type(wanted: str, columns: int) -> str:
    """The type asked for, or the one that fits rows of this length: K- and I-quants need 256, others 32, F16 none."""
    if columns % GGML_BLOCKS[wanted][0] and wanted in FALLBACK:
        wanted = FALLBACK[wanted]
    return "F16" if columns % GGML_BLOCKS[wanted][0] else wanted


def needs_importance(mix: str, type_: str, name: str) -> bool:
    """Whether llama.cpp refuses to give this matrix this type without an importance matrix."""
    if name in (EMBEDDING, HEAD):
        return False
    return type_ in NEED_IMPORTANCE or (mix == "Q2_K_S" and type_ == "Q2_K")


def uses_importance(mix: str, setting: str = "auto") -> bool:
    """Whether a matrix is used where calibration text is at hand; `setting`: auto, on or off."""
    if mix in MIXES_THAT_NEED_IMPORTANCE:
        return True
    return mix not in UNQUANTIZED and (setting == "on" or (setting == "auto" and mix in HELPED_BY_IMPORTANCE))


def wanted_types(
    columns: Mapping[str, int], mix: str, *, layers: int, heads_a_key: int, importance: bool
) -> dict[str, str]:
    """Type that a mix wants for each quantizable matrix, whether its width allows it or not.

    `columns`: GGUF name → row length. `heads_a_key`: attention heads a key head. `importance`: with a matrix.
    """
    if mix in UNQUANTIZED:
        return dict.fromkeys(columns, mix)
    tied = HEAD not in columns
    return {
        name: _wanted(name, width, mix, tied=tied, layers=layers, heads_a_key=heads_a_key, importance=importance)
        for name, width in columns.items()
    }


def types_of(
    columns: Mapping[str, int], mix: str, *, layers: int, heads_a_key: int, importance: bool
) -> dict[str, str]:
    """Type that each matrix is stored as: `wanted_types`, and the fallbacks at odd widths."""
    wanted = wanted_types(columns, mix, layers=layers, heads_a_key=heads_a_key, importance=importance)
    return wanted if mix in UNQUANTIZED else {name: usable_type(type_, columns[name]) for name, type_ in wanted.items()}


def chosen_overrides(columns: Mapping[str, int], tensor_types: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Matrix → type that the user asked for. `tensor_types`: regular expression searched in the name → ggml type; the
    first that matches counts.

    UserError for a pattern that is no regular expression or matches no matrix, and for a type that there is not.
    """
    found: dict[str, str] = {}
    for pattern, type_ in tensor_types:
        if type_.upper() not in GGML_BLOCKS:
            mix = BASE_TYPES.get(type_.upper())
            raise UserError(
                f"export.tensor_types: no ggml type '{type_}' (for {pattern!r})",
                f"{type_} is a mix; name a type of one tensor, e.g. {mix}" if mix else did_you_mean(type_, GGML_BLOCKS),
            )
        try:
            matching = [name for name in columns if re.search(pattern, name)]
        except re.error as error:
            raise UserError(
                f"export.tensor_types: {pattern!r} is not a regular expression: {error}", "e.g. ffn_down, or blk\\.0\\."
            ) from error
        if not matching:
            raise UserError(
                f"export.tensor_types: {pattern!r} matches no matrix of this model",
                f"its matrices are {', '.join(sorted({re.sub(r'^blk[.][0-9]+[.]', 'blk.N.', n) for n in columns}))}",
            )
        for name in matching:
            found.setdefault(name, type_.upper())
    return found


def _wanted(name: str, columns: int, mix: str, *, tied: bool, layers: int, heads_a_key: int, importance: bool) -> str:
    base = BASE_TYPES[mix]
    if name == HEAD or (tied and name == EMBEDDING):
        if columns % GGML_BLOCKS[base][0]:
            return "Q8_0"
        if mix in (*VERY_LOW, "IQ3_XXS"):
            return "Q5_K"
        return base if base == "Q8_0" else "Q6_K"
    if name == EMBEDDING:
        if mix in ("IQ2_XXS", "IQ2_XS", "IQ1_S", "IQ1_M"):
            return "Q2_K"
        return "IQ3_S" if mix in (*IQ2_LARGER, "IQ3_XXS") else base
    found = LAYER.match(name)
    if found is None:
        return base
    layer, part = int(found[1]), name[found.end() :].removesuffix(".weight")
    if part in ("attn_v", "attn_qkv"):
        wanted = _value_type(mix, base, layer, layers, heads_a_key, importance)
        # llama.cpp's rule for its 70B: 80 layers and few value heads
        seventy = layers == LAYERS_OF_70B and heads_a_key > 1 and mix not in VERY_LOW
        return "Q5_K" if seventy and wanted in ("Q3_K", "Q4_K") else wanted
    if part == "ffn_down":
        return _down_type(mix, base, layer, layers, importance)
    if part in ("attn_q", "attn_k"):
        return {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}.get(mix, base)
    if part == "attn_output":
        return _ATTENTION_OUTPUT.get(mix, base)
    if part in ("ffn_gate", "ffn_up") and mix == "IQ3_XS":
        return "IQ3_XXS" if layers // 8 <= layer < 7 * layers // 8 else base
    return base


_ATTENTION_OUTPUT = {
    "Q2_K": "Q3_K",
    "IQ3_XXS": "IQ3_S",
    "Q3_K_M": "Q4_K",
    "Q3_K_L": "Q5_K",
    "IQ3_M": "Q4_K",
    "IQ1_S": "IQ2_XXS",
    "IQ1_M": "IQ2_XXS",
    "IQ2_S": "IQ3_S",
    "IQ2_M": "IQ3_S",
}


def _value_type(mix: str, base: str, layer: int, layers: int, heads_a_key: int, importance: bool) -> str:
    grouped = heads_a_key >= GROUPED
    if mix in VERY_LOW:
        return "Q4_K" if grouped else "IQ3_S" if mix in IQ2_LARGER else "Q2_K"
    if mix == "IQ3_XXS":
        return "Q4_K" if grouped else "IQ3_XXS" if importance else "IQ3_S"
    if mix in ("Q2_K", "Q2_K_S", "IQ3_XS", "IQ3_S") and grouped:
        return "Q4_K"
    if mix in ("IQ4_NL", "IQ4_XS") and grouped:
        return "Q5_K"
    if mix in ("Q4_K_M", "Q5_K_M") and more_bits(layer, layers):
        return "Q6_K"
    fixed = {
        "Q2_K": "Q3_K",
        "IQ3_M": "Q4_K",
        "Q3_K_M": "Q5_K" if layer < 2 else "Q4_K",
        "Q3_K_L": "Q5_K",
        "Q4_K_S": "Q5_K" if layer < 4 else base,
    }
    return fixed.get(mix, base)


def _down_type(mix: str, base: str, layer: int, layers: int, importance: bool) -> str:
    early = layer < layers // 8
    if mix in VERY_LOW:
        return ("IQ3_S" if mix in IQ2_LARGER else "Q2_K") if early else base
    if mix == "IQ3_XXS":
        return base if importance else "Q4_K" if early else "Q3_K"
    if mix in ("Q4_K_M", "Q5_K_M"):
        return "Q6_K" if more_bits(layer, layers) else base
    if mix in ("IQ4_NL", "IQ4_XS") and early and not importance:
        return "Q5_K"
    if mix in ("Q4_0", "Q5_0") and early and importance:
        return {"Q4_0": "Q4_1", "Q5_0": "Q5_1"}[mix]
    fixed = {"Q2_K": "Q3_K", "Q3_K_M": "Q5_K" if layer < layers // 16 else "Q4_K", "Q3_K_L": "Q5_K"}
    early_only = {"Q2_K_S": "Q4_K", "IQ3_M": "Q4_K", "Q4_K_S": "Q5_K"}
    return fixed.get(mix) or (early_only.get(mix, base) if early else base)


def more_bits(layer: int, layers: int) -> bool:
    """llama.cpp's `use_more_bits`: the first and last eighth, and every third layer between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
