"""From a config.json to what its GGUF holds: every tensor's name, shape and change, the metadata, the rotary tables.

The families are in families.py; nothing here knows one by name.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgedistill.errors import UserError
from edgedistill.models.config import Config, Sizes
from edgedistill.models.families import FAMILIES, Change, Family, Tensor
from edgedistill.models.rope import MetadataValue, Rope, rope_of
from edgedistill.models.weights import HEAD as TIED_HEAD
from edgedistill.models.weights import StoredTensor
from edgedistill.records.shape import Shape

__all__ = ["TIED_HEAD", "architecture_of", "from_interleaved", "model_of", "rope_of", "tensor_map", "to_interleaved"]

OWN_CONVERTER = "or give llama.cpp's own converter: --converter PATH/convert_hf_to_gguf.py"
IGNORED_BUFFER = "rotary_emb.inv_freq"  # old checkpoints carry it; computed from the config
# Added to the activations or looked up a row at a time: small, and llama.cpp wants them in float32.
FLOAT32_MATRICES = ("position_embd.weight", "token_types.weight")


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of the torch model: its GGUF name, its shape there (as torch has it), and what changes on the way.

    `rope_heads`: the number of heads whose rows are permuted; 0 where none are. `row`, `rows`: which row of a matrix
    of so many rows it is, where a GGUF tensor collects several.
    """

    gguf_name: str
    shape: tuple[int, ...]
    rope_heads: int = 0
    change: Change = ""
    row: int = 0
    rows: int = 0

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Of the GGUF tensor, row-major."""
        if self.change == "transposed":
            return self.shape[::-1]
        return (self.rows, *self.shape) if self.rows else self.shape

    @property
    def vector(self) -> bool:
        """Stored in float32 whatever the rest is: norms, biases, position and token type tables."""
        return len(self.shape) == 1 or self.gguf_name in FLOAT32_MATRICES


@dataclass(frozen=True)
class Model:
    """What a config.json says of the GGUF to write. `specs`: torch name → TensorSpec, in the GGUF's order."""

    family: Family
    sizes: Sizes
    tied: bool
    specs: dict[str, TensorSpec]
    keys: dict[str, MetadataValue]
    rope: Rope
    notes: list[str]

    @property
    def context_length(self) -> int:
        return int(str(self.keys["context_length"]))


def _near_family(name: str) -> str:
    """ "did you mean 'x'? ", by what is before the head's name, which many classes share; "" where nothing is near."""
    stems = {family.split("For")[0].removesuffix("Model"): family for family in FAMILIES}
    near = difflib.get_close_matches(name.split("For")[0], stems, n=1, cutoff=0.85)
    return f"did you mean '{stems[near[0]]}'? " if near else ""


def architecture_of(config: Mapping[str, Any], *, where: str) -> Family:
    """The table's entry for a parsed config.json; UserError with what works where there is none."""
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise UserError(
            f"{where}: 'architectures' is {names!r}", f"name the model class there, one of {', '.join(FAMILIES)}"
        )
    found = FAMILIES.get(names[0])
    if found is None:
        raise UserError(
            f"{where}: no GGUF converter for architecture '{names[0]}'",
            f"{_near_family(names[0])}works: {', '.join(FAMILIES)}; {OWN_CONVERTER}",
        )
    if config.get("model_type") != found.model_type:
        raise UserError(
            f"{where}: architecture '{names[0]}' does not go with model_type {config.get('model_type')!r}",
            f"correct config.json; both name the same family (model_type '{found.model_type}')",
        )
    return found


def model_of(values: Mapping[str, Any], *, where: str) -> Model:
    """Everything that a parsed config.json decides. UserError for what llama.cpp cannot run, or runs differently."""
    family = architecture_of(values, where=where)
    config = Config(values, where=where, other_names=family.other_names)
    if values.get("quantization_config"):
        raise UserError(
            f"{where}: the weights are already quantized (quantization_config is set)",
            "use the model's original weights in bf16, fp16 or fp32",
        )
    tied = config.flag("tie_word_embeddings", default=family.tied)
    sizes = _sizes(config, family, tied=tied)
    if family.needs_head and tied:
        raise UserError(
            f"{where}: tie_word_embeddings is true, but llama.cpp runs {family.model_type} only with its own head",
            "load it, set model.config.tie_word_embeddings = False, clone the head's weight, and save it again",
        )
    keys = family.keys(config, sizes)
    rope = Rope({})
    if family.ropes:
        rope = rope_of(
            values, sizes, where=where, kinds=family.ropes, theta=config.number("rope_theta", family.theta),
            partial=family.partial,
        )  # fmt: skip
    keys |= {f"rope.{key}": value for key, value in rope.metadata.items()}
    notes = list(rope.notes)
    if keys["context_length"] != sizes.max_position_embeddings:
        notes.append(
            f"the context is {keys['context_length']} tokens and not {sizes.max_position_embeddings}: beyond it the"
            " original's attention slides or its positions are stretched, and llama.cpp's are not"
        )
    return Model(family, sizes, tied, specs_of(family, sizes), keys, rope, notes)


def tensor_map(shape: Shape, architecture: Family) -> dict[str, TensorSpec]:
    """torch name → TensorSpec of a model that a Shape describes, in the order in which the GGUF holds them."""
    return specs_of(
        architecture,
        Sizes(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.num_hidden_layers,
            num_attention_heads=shape.num_attention_heads,
            num_key_value_heads=shape.num_key_value_heads,
            head_dim=shape.head_dim,
            max_position_embeddings=shape.max_position_embeddings,
            flags=frozenset() if shape.tie_word_embeddings else frozenset({"untied"}),
        ),
    )


def as_modules(stored: Mapping[str, StoredTensor], family: Family) -> dict[str, StoredTensor]:
    """The tensors of the files under the torch modules' names: renamed, fused ones apart, buffers left out."""
    found: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        for pattern, replacement in family.renamed:
            name = re.sub(pattern, replacement, name)
        if name.endswith(IGNORED_BUFFER) or any(re.search(pattern, name) for pattern in family.ignored):
            continue
        ends = next((end for end in family.split if name.endswith(end)), None)
        if ends is None or tensor.shape[0] % len(family.split[ends]):
            found[name] = tensor
            continue
        parts = family.split[ends]
        rows = tensor.shape[0] // len(parts)
        size = tensor.bytes // len(parts)
        for index, part in enumerate(parts):
            found[name.removesuffix(ends) + part] = replace(
                tensor, offset=tensor.offset + index * size, shape=(rows, *tensor.shape[1:])
            )
    return found


def by_gguf_name(specs: Mapping[str, TensorSpec]) -> dict[str, list[tuple[str, TensorSpec]]]:
    """GGUF name → the torch tensors that it is made of, in order."""
    found: dict[str, list[tuple[str, TensorSpec]]] = {}
    for name, spec in specs.items():
        found.setdefault(spec.gguf_name, []).append((name, spec))
    return found


def _sizes(config: Config, family: Family, *, tied: bool) -> Sizes:
    hidden = config.size("hidden_size")
    heads = config.size("num_attention_heads")
    kv_heads = config.size("num_key_value_heads", family.kv_heads or heads)
    if heads % kv_heads:
        raise UserError(
            f"{config.where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}",
            "correct config.json; query heads share key/value heads in equal groups",
        )
    if config.get("head_dim") is None and family.head_dim is None and hidden % heads:
        raise UserError(
            f"{config.where}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}",
            "correct config.json: these heads do not divide the hidden size",
        )
    head_dim = config.size("head_dim", family.head_dim or hidden // heads)
    if family.ropes and head_dim % 2:
        raise UserError(
            f"{config.where}: head_dim {head_dim} is odd", "rotary embeddings turn pairs: use an even head_dim"
        )
    flags = {flag for flag in family.flags if config.flag(flag)} | (set() if tied else {"untied"})
    # Only GPT-2 may leave it out.
    ffn = config.size("intermediate_size", 4 * hidden if "n_embd" in family.other_names.values() else None)
    return Sizes(
        vocab_size=config.size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=config.size("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=config.size("max_position_embeddings", family.positions),
        token_types=config.size("type_vocab_size", 2) if family.task == "embedding" else 0,
        flags=frozenset(flags),
    )


def specs_of(family: Family, sizes: Sizes) -> dict[str, TensorSpec]:
    specs: dict[str, TensorSpec] = {}
    for name, tensor in family.first.items():
        _add(specs, name, tensor, tensor.gguf, family, sizes)
    for layer in range(sizes.num_hidden_layers):
        for name, tensor in family.layer.items():
            full = family.layer_prefix.replace("{}", str(layer)) + name
            _add(specs, full, tensor, f"blk.{layer}.{tensor.gguf}", family, sizes)
    for name, tensor in family.last.items():
        _add(specs, name, tensor, tensor.gguf, family, sizes)
    return specs


def _add(specs: dict[str, TensorSpec], name: str, tensor: Tensor, gguf_name: str, family: Family, sizes: Sizes) -> None:
    if tensor.when and (tensor.when.removeprefix("!") in sizes.flags) == tensor.when.startswith("!"):
        return
    shape = tuple(sizes.of(letter) for letter in tensor.dims)
    if tensor.change == "row":
        for row in range(shape[0]):
            specs[name.replace("{}", str(row))] = TensorSpec(gguf_name, shape[1:], change="row", row=row, rows=shape[0])
        return
    heads = 0
    if tensor.change == "rope" and family.interleaved_rope:
        heads = sizes.num_attention_heads if tensor.dims[0] == "Q" else sizes.num_key_value_heads
    specs[name] = TensorSpec(gguf_name, shape, heads, "" if tensor.change == "rope" else tensor.change)


def to_interleaved(weight: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows of q or k from transformers' order (a head's two halves) to llama.cpp's (its pairs, interleaved).

    `weight`: [heads * head_dim, ...]. transformers rotates (i, i + head_dim/2) together, llama.cpp (2i, 2i+1).
    """
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


def from_interleaved(weight: NDArray[Any], heads: int) -> NDArray[Any]:
    """The inverse of `to_interleaved`."""
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)
