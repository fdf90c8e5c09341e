"""A GGUF's stored weights as float32 under the torch modules' names: what the torch model must hold to equal it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgedistill.errors import UserError, did_you_mean
from edgedistill.gguf.reader import GgufFile, GgufTensor
from edgedistill.gguf.split import open_gguf
from edgedistill.models.architectures import TensorSpec, by_gguf_name, from_interleaved, specs_of
from edgedistill.models.config import Sizes
from edgedistill.models.families import FAMILIES, Family
from edgedistill.models.rope import FACTORS, LONG_FACTORS, SHORT_FACTORS

COMPUTED = frozenset({FACTORS, LONG_FACTORS, SHORT_FACTORS})  # from the config; no parameters of the torch model
# llama and mistral are one architecture there, with the same names.
GGUF_FAMILIES: dict[str, Family] = {family.gguf: family for family in reversed(FAMILIES.values())}


def dequantized(gguf: Path) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """(torch name, float32 values in torch's shape and row order), one GGUF tensor at a time.

    `gguf`: the first file of one that is split. A tied head is not repeated. Raises UserError for a file that is no
    GGUF of a family in the table, and where a file of several is missing.
    """
    from gguf.quants import dequantize

    tensors, stored = _read(gguf)
    for tensor in stored:
        if tensor.name in COMPUTED:
            continue
        values = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        for name, spec in tensors[tensor.name]:
            yield name, _as_in_torch(values.reshape(spec.stored_shape), spec)


def stored_types(gguf: Path) -> dict[str, str]:
    """torch name → ggml type ("Q4_K"), of every tensor that is a parameter. UserError as `dequantized`."""
    tensors, stored = _read(gguf)
    return {
        name: str(tensor.tensor_type.name)
        for tensor in stored
        if tensor.name not in COMPUTED
        for name, _ in tensors[tensor.name]
    }


def _read(gguf: Path) -> tuple[dict[str, list[tuple[str, TensorSpec]]], list[GgufTensor]]:
    """GGUF name → the torch tensors that it is made of, and the tensors of all the GGUF's files."""
    readers = open_gguf(gguf)
    stored = [tensor for reader in readers for tensor in reader.tensors]
    tensors = by_gguf_name(_specs(readers[0], gguf, stored))
    for tensor in stored:
        if tensor.name not in COMPUTED and tensor.name not in tensors:
            raise UserError(f"{gguf}: unexpected tensor {tensor.name}", "export it with this version of edgedistill")
    return tensors, stored


def _as_in_torch(values: NDArray[np.float32], spec: TensorSpec) -> NDArray[np.float32]:
    """The inverse of what the conversion did."""
    if spec.rope_heads:
        return from_interleaved(values, spec.rope_heads)
    if spec.change == "transposed":
        return np.ascontiguousarray(values.T)
    if spec.change == "plus_one":
        return values - np.float32(1)
    return values[spec.row] if spec.rows else values


def _specs(reader: GgufFile, gguf: Path, stored: Sequence[GgufTensor]) -> Mapping[str, TensorSpec]:
    def value(key: str, default: int | None = None) -> int:
        found = reader.value(key, default)
        if found is None:
            raise UserError(f"{gguf} has no metadata {key}", "export it with this version of edgedistill")
        return int(found)

    architecture = str(reader.value("general.architecture", ""))
    if architecture not in GGUF_FAMILIES:
        raise UserError(f"{gguf} is of architecture '{architecture}'", did_you_mean(architecture, GGUF_FAMILIES))
    family = GGUF_FAMILIES[architecture]
    rows = {tensor.name: int(tensor.shape[-1]) for tensor in stored}
    # A flag is what decides whether its tensors are there: take all that could be, and keep those that are.
    flags = frozenset({"untied", *(f for f in family.flags if f != "use_parallel_residual")})
    heads = value(f"{architecture}.attention.head_count")
    hidden = value(f"{architecture}.embedding_length")
    sizes = Sizes(
        vocab_size=value(f"{architecture}.vocab_size", rows.get("token_embd.weight")),
        hidden_size=hidden,
        intermediate_size=value(f"{architecture}.feed_forward_length"),
        num_hidden_layers=value(f"{architecture}.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=value(f"{architecture}.attention.head_count_kv", heads),
        head_dim=value(f"{architecture}.attention.key_length", hidden // heads),
        max_position_embeddings=rows.get("position_embd.weight", value(f"{architecture}.context_length")),
        token_types=rows.get("token_types.weight", 0),
        flags=flags,
    )
    return {name: spec for name, spec in specs_of(family, sizes).items() if spec.gguf_name in rows}
