"""A GGUF's stored weights as float32 under transformers' names: what the torch model must hold to equal it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgedistill.errors import UserError, did_you_mean
from edgedistill.gguf.architectures import GGUF_FAMILIES, Architecture, from_interleaved, tensor_map
from edgedistill.records import Shape

if TYPE_CHECKING:
    from gguf import GGUFReader

COMPUTED = frozenset({"rope_freqs.weight"})  # from the config; no parameter of the torch model


def dequantized(gguf: Path) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """(transformers name, float32 values in torch's shape and row order), one tensor at a time.

    A tied head is not repeated. Raises UserError for a file that is no GGUF of a family in the table.
    """
    from gguf import GGUFReader
    from gguf.quants import dequantize

    try:
        reader = GGUFReader(gguf)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise UserError(f"{gguf} cannot be read as GGUF: {error}", "export the artifact again") from error
    shape, architecture = _shape_of(reader, gguf)
    by_gguf_name = {spec.gguf_name: (name, spec) for name, spec in tensor_map(shape, architecture).items()}
    for tensor in reader.tensors:
        if tensor.name in COMPUTED:
            continue
        if tensor.name not in by_gguf_name:
            raise UserError(f"{gguf}: unexpected tensor {tensor.name}", "export it with this version of edgedistill")
        name, spec = by_gguf_name[tensor.name]
        values = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32).reshape(spec.shape)
        yield name, from_interleaved(values, spec.rope_heads) if spec.rope_heads else values


def stored_types(gguf: Path) -> dict[str, str]:
    """transformers name → ggml type ("Q4_K"), of every tensor that is a parameter. UserError as `dequantized`."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(gguf)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise UserError(f"{gguf} cannot be read as GGUF: {error}", "export the artifact again") from error
    shape, architecture = _shape_of(reader, gguf)
    by_gguf_name = {spec.gguf_name: name for name, spec in tensor_map(shape, architecture).items()}
    return {by_gguf_name[t.name]: str(t.tensor_type.name) for t in reader.tensors if t.name not in COMPUTED}


def _shape_of(reader: GGUFReader, gguf: Path) -> tuple[Shape, Architecture]:
    def value(key: str) -> int:
        field = reader.get_field(key)
        if field is None:
            raise UserError(f"{gguf} has no metadata {key}", "export it with this version of edgedistill")
        return int(field.contents())

    named = reader.get_field("general.architecture")
    family = str(named.contents()) if named is not None else ""
    if family not in GGUF_FAMILIES:
        raise UserError(f"{gguf} is of architecture '{family}'", did_you_mean(family, GGUF_FAMILIES))
    architecture = GGUF_FAMILIES[family]
    shape = Shape(
        family=family,
        vocab_size=value(f"{family}.vocab_size"),
        hidden_size=value(f"{family}.embedding_length"),
        intermediate_size=value(f"{family}.feed_forward_length"),
        num_hidden_layers=value(f"{family}.block_count"),
        num_attention_heads=value(f"{family}.attention.head_count"),
        num_key_value_heads=value(f"{family}.attention.head_count_kv"),
        head_dim=value(f"{family}.attention.key_length"),
        tie_word_embeddings=all(t.name != "output.weight" for t in reader.tensors),
        max_position_embeddings=value(f"{family}.context_length"),
        attention_bias=architecture.qkv_bias,
        qk_norm=architecture.qk_norm,
    )
    return shape, architecture
