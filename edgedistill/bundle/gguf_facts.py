"""What a GGUF's header says, held to what the manifest says of it: types, sizes, shape, tokenizer, quantization."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgedistill.bundle.claims import context_asked, refuse
from edgedistill.bundle.tokenizer_facts import CONVERTED, check_gguf_tokenizer
from edgedistill.guards.gguf import GgufHeader, check_ggufs
from edgedistill.models.families import DECODERS
from edgedistill.quantization.mixes import FILE_TYPES, quantizable, types_of
from edgedistill.records.manifest import MANIFEST, BundleArtifact, Manifest
from edgedistill.strict import shown

Read = Callable[[str], bytes]
TYPE_NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K",
    13: "Q5_K", 14: "Q6_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 29: "IQ1_M", 30: "BF16",
}  # fmt: skip
DERIVED = "rope_"  # factors of positions, which torch computes and does not count


def check_gguf_facts(folder: Path, manifest: Manifest, artifact: BundleArtifact, read: Read) -> list[str]:
    """Raises UserError naming the claim that the artifact's own header denies; notes on what was not compared."""
    heads = check_ggufs(folder / artifact.folder / artifact.entry)
    named = {str(head.path.relative_to(folder / artifact.folder)) for head in heads}
    if named != {entry.path for entry in artifact.files}:
        refuse(f"{MANIFEST}: the files of {artifact.name} are not those that {artifact.entry} says it has")
    kinds: dict[str, tuple[int, tuple[int, ...]]] = {}
    for head in heads:
        kinds |= head.kinds
    sizes = sum(sum(head.tensors.values()) for head in heads)
    types = {name: TYPE_NAMES.get(kind, f"type {kind}") for name, (kind, _) in kinds.items()}
    elements = {name: math.prod(dims) for name, (_, dims) in kinds.items()}
    claims: dict[str, tuple[Any, Any]] = {
        "tensor_types": (artifact.tensor_types, dict(Counter(types.values()))),
        "bits_per_weight": (artifact.bits_per_weight, 8 * sizes / max(1, sum(elements.values()))),
        "parameters": (artifact.parameters, sum(n for name, n in elements.items() if not name.startswith(DERIVED))),
        "vocab_size": (artifact.vocab_size, heads[0].arrays.get("tokenizer.ggml.tokens", (0, 0))[1]),
    }
    for field, (said, found) in claims.items():
        if said != found and not (isinstance(said, float) and math.isclose(said, found, rel_tol=1e-9)):
            refuse(f"{MANIFEST}: {field} of {artifact.name} is {shown(said)}, and the file has {shown(found)}")
    _check_shape(manifest, artifact, heads[0])
    _check_quantization(artifact, heads[0], types, kinds)
    return check_gguf_tokenizer(manifest, artifact, heads[0], read)


def _check_shape(manifest: Manifest, artifact: BundleArtifact, head: GgufHeader) -> None:
    shape, prefix = manifest.student.shape, head.values.get("general.architecture")
    context = int(head.values.get(f"{prefix}.context_length", 0))
    family = DECODERS.get(shape.family)
    if (family is None or prefix != family.gguf) and not any(note.startswith(CONVERTED) for note in artifact.notes):
        refuse(f"{MANIFEST}: the student's family is {shown(shape.family)}, and {artifact.name} is {shown(prefix)}")
    if context > shape.max_position_embeddings or min(context, context_asked(manifest)) != artifact.context_tokens:
        refuse(
            f"{artifact.name}: {prefix}.context_length is {context}, it was made for {context_asked(manifest)}, and "
            f"{MANIFEST} says {artifact.context_tokens}"
        )
    keys = {
        "block_count": shape.num_hidden_layers,
        "embedding_length": shape.hidden_size,
        "feed_forward_length": shape.intermediate_size,
        "attention.head_count": shape.num_attention_heads,
        "attention.head_count_kv": shape.num_key_value_heads,
    }
    for key, said in keys.items():
        found = head.values.get(f"{prefix}.{key}", said)
        if found != said:
            refuse(f"{MANIFEST}: {key} of {artifact.name} is {shown(found)}, and the student's shape says {said}")


def _check_quantization(
    artifact: BundleArtifact, head: GgufHeader, types: dict[str, str], kinds: dict[str, tuple[int, tuple[int, ...]]]
) -> None:
    """Each matrix has the type that the mix gives it, or that an override or a fallback names."""
    name, mix = artifact.name, artifact.quantization
    if head.values.get("general.file_type") != FILE_TYPES[mix]:
        refuse(
            f"{MANIFEST}: {name} says {mix}, and the file's general.file_type {head.values.get('general.file_type')}"
        )
    columns = {one: dims[0] for one, (_, dims) in kinds.items() if quantizable(one, len(dims))}
    prefix = head.values.get("general.architecture")
    heads = int(head.values.get(f"{prefix}.attention.head_count", 1))
    heads_a_key = heads // max(1, int(head.values.get(f"{prefix}.attention.head_count_kv", heads)))
    layers = int(head.values.get(f"{prefix}.block_count", 1))
    wanted = [
        types_of(columns, mix, layers=layers, heads_a_key=heads_a_key, importance=importance)
        for importance in (False, True)
    ]
    fallbacks = {one.tensor: one.got for one in artifact.fallbacks}
    for tensor, got in fallbacks.items():
        if types.get(tensor) != got:
            refuse(f"{MANIFEST}: the fallback of {shown(tensor)} to {shown(got)} is not what {name} has")
    for tensor in columns:
        expected = {artifact.overrides.get(tensor), fallbacks.get(tensor), *(one[tensor] for one in wanted)}
        if types[tensor] not in expected:
            refuse(f"{MANIFEST}: {name} says {mix}, and its {tensor} is {types[tensor]}, not {wanted[0][tensor]}")
