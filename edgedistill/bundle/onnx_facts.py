"""What a decoder's ONNX graph or a transformers folder holds, held to what the manifest says of it.

The counting is the exporter's (onnx/graph.py, other_formats/bitsandbytes.py), on readers that need neither onnx nor
torch.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from edgedistill.bundle.claims import refuse
from edgedistill.bundle.tokenizer_facts import check_copied_tokenizer, check_stop_tokens
from edgedistill.guards.onnx_model import BITS, OnnxModel, check_onnx
from edgedistill.guards.transformers_folder import CONFIG_FILE, INDEX, rebuilt_folder
from edgedistill.models.companions import TOKENIZER_NAMES
from edgedistill.models.hf_tokenizer import TOKENIZER_FILES
from edgedistill.models.safetensors_header import read_safetensors_header
from edgedistill.onnx.graph import COMPUTED, MODEL_FILE, matrix_name
from edgedistill.records.manifest import MANIFEST, BundleArtifact, Tensor
from edgedistill.strict import shown

Read = Callable[[str], bytes]
GENAI_CONFIG = "genai_config.json"
# What else such a folder may hold: no code, no weights of another kind, nothing that nobody asked for.
TOKENIZER_PARTS = frozenset([*TOKENIZER_FILES, *TOKENIZER_NAMES])
TEMPLATES = re.compile(r"additional_chat_templates/[A-Za-z0-9_.\-]{1,100}\.jinja")
FOLDER_FILES = frozenset([CONFIG_FILE, "generation_config.json", INDEX])
# TensorProto.DataType → its name there, and numpy's
NAMES = {
    1: ("FLOAT", "float32"), 2: ("UINT8", "uint8"), 3: ("INT8", "int8"), 4: ("UINT16", "uint16"),
    5: ("INT16", "int16"), 6: ("INT32", "int32"), 7: ("INT64", "int64"), 9: ("BOOL", "bool"),
    10: ("FLOAT16", "float16"), 11: ("DOUBLE", "float64"), 12: ("UINT32", "uint32"), 13: ("UINT64", "uint64"),
    16: ("BFLOAT16", "bfloat16"), 21: ("UINT4", "uint4"), 22: ("INT4", "int4"),
}  # fmt: skip
INDEX_TYPES = (6, 7, 9)  # int32, int64, bool: no weights
FLOATS = {"FP32": "FLOAT", "FP16": "FLOAT16", "BF16": "BFLOAT16"}
MATRIX_BITS = {"INT4": 4, "INT8": 8}


class Stored(NamedTuple):
    """A weight of the graph as the exporter counts it."""

    name: str
    type: str
    rank: int
    bytes: int


def check_onnx_facts(folder: Path, artifact: BundleArtifact, read: Read) -> None:
    """Raises UserError naming the claim that the graph denies."""
    if artifact.entry != "." or MODEL_FILE not in {entry.path for entry in artifact.files}:
        refuse(f"{MANIFEST}: {artifact.name} is no folder with a {MODEL_FILE}")
    graph = check_onnx(folder / artifact.folder / MODEL_FILE)
    for name in graph.files:
        if name not in {entry.path for entry in artifact.files}:
            refuse(f"{MANIFEST}: the weights of {artifact.name} lie in {shown(name)}, which is none of its files")
    _check_names(artifact, {MODEL_FILE, GENAI_CONFIG, *graph.files})
    weights = _stored(graph)
    _check_quantization(artifact.name, artifact.quantization, graph, weights)
    fallbacks = sorted(
        (one.name, artifact.quantization, one.type)
        for one in weights
        if artifact.quantization in MATRIX_BITS and one.rank > 1 and one.type != artifact.quantization
    )
    _equal(
        artifact,
        {
            "tensor_types": (artifact.tensor_types, dict(Counter(one.type for one in weights))),
            "bits_per_weight": (artifact.bits_per_weight, 8 * sum(w.bytes for w in weights) / artifact.parameters),
            "fallbacks": (sorted((one.tensor, one.wanted, one.got) for one in artifact.fallbacks), fallbacks),
            "overrides": (artifact.overrides, {}),
            "inputs": (artifact.inputs, _signature(graph, graph.inputs)),
            "outputs": (artifact.outputs, _signature(graph, graph.outputs)),
        },
    )
    _check_config(artifact, read)
    check_copied_tokenizer(artifact, read)


def check_folder_facts(folder: Path, artifact: BundleArtifact, read: Read) -> None:
    """The same of a transformers folder with bitsandbytes' layers: types and bytes of its safetensors."""
    _, weights = rebuilt_folder(folder / artifact.folder)
    _check_names(artifact, {*FOLDER_FILES, *weights})
    counts: Counter[str] = Counter()
    size = 0
    for entry in artifact.files:
        if entry.path.endswith(".safetensors"):
            header = read_safetensors_header(folder / artifact.folder / entry.path)
            counts.update(tensor.dtype for tensor in header.tensors.values())
            size += entry.bytes
    _equal(
        artifact,
        {
            "tensor_types": (artifact.tensor_types, dict(counts)),
            "bits_per_weight": (artifact.bits_per_weight, 8 * size / artifact.parameters),
            "fallbacks": (artifact.fallbacks, []),
            "overrides": (artifact.overrides, {}),
        },
    )
    check_copied_tokenizer(artifact, read)


def _check_names(artifact: BundleArtifact, own: set[str]) -> None:
    """The artifact's files are those that its runtime opens, and its tokenizer's."""
    for entry in artifact.files:
        if entry.path not in own | TOKENIZER_PARTS and not TEMPLATES.fullmatch(entry.path):
            refuse(f"{MANIFEST}: {artifact.name} holds {shown(entry.path)}, which {artifact.runtime} does not open")


def _equal(artifact: BundleArtifact, claims: dict[str, tuple[Any, Any]]) -> None:
    for field, (said, found) in claims.items():
        if said != found and not (isinstance(said, float) and math.isclose(said, found, rel_tol=1e-9)):
            refuse(f"{MANIFEST}: {field} of {artifact.name} is {shown(said)}, and the files have {shown(found)}")


def _stored(graph: OnnxModel) -> list[Stored]:
    """Every weight once: quantized matrices by their MatMulNBits node, the rest as they lie there."""
    found = []
    counted: set[str] = set()
    for bits, inputs in graph.matrices:
        if not inputs:
            refuse(f"{graph.path.name}: a MatMulNBits has no weight")
        parts = [name for name in inputs if name in graph.weights]
        counted.update(parts)
        found.append(Stored(matrix_name(inputs[0]), f"INT{bits}", 2, sum(_size(*graph.weights[one]) for one in parts)))
    for name, (kind, dims) in graph.weights.items():
        if name not in counted and not name.startswith(COMPUTED) and kind not in INDEX_TYPES:
            found.append(Stored(matrix_name(name), _names(kind)[0], len(dims), _size(kind, dims)))
    return found


def _size(kind: int, dims: tuple[int, ...]) -> int:
    return prod(dims) * max(8, BITS[kind]) // 8


def _names(kind: int) -> tuple[str, str]:
    return NAMES.get(kind, (f"type {kind}", f"type {kind}"))


def _check_quantization(name: str, quantization: str, graph: OnnxModel, weights: list[Stored]) -> None:
    bits = sorted({bits for bits, _ in graph.matrices})
    if quantization in MATRIX_BITS:
        if bits != [MATRIX_BITS[quantization]]:
            refuse(f"{MANIFEST}: {name} says {quantization}, and the matrices of its graph have {shown(bits)} bits")
    elif quantization in FLOATS:
        kinds = {one.type for one in weights if one.rank > 1}
        if bits or kinds != {FLOATS[quantization]}:
            refuse(f"{MANIFEST}: {name} says {quantization}, and its matrices are {shown(sorted(kinds))}")
    else:
        refuse(f"{MANIFEST}: {name} says {quantization}, which no decoder of onnx has")


def _signature(graph: OnnxModel, values: dict[str, tuple[int, tuple[int | str, ...]]]) -> list[Tensor]:
    return [
        Tensor(name=name, dtype=_names(kind)[1], shape=list(dims))
        for name, (kind, dims) in values.items()
        if name not in graph.weights
    ]


def _check_config(artifact: BundleArtifact, read: Read) -> None:
    """genai_config.json: the context and the vocabulary are the manifest's, the tokenizer's end of text stops."""
    try:
        config = json.loads(read(f"{artifact.folder}/{GENAI_CONFIG}"))
    except KeyError:
        refuse(f"{artifact.name} has no {GENAI_CONFIG}")
    model, search = config.get("model"), config.get("search")
    if not isinstance(model, dict) or not isinstance(search, dict):
        refuse(f"{artifact.folder}/{GENAI_CONFIG} has no model or no search")
    for key, said, found in (
        ("search.max_length", artifact.context_tokens, search.get("max_length")),
        ("model.vocab_size", artifact.vocab_size, model.get("vocab_size")),
    ):
        if said != found:
            refuse(f"{MANIFEST}: {artifact.name} says {said}, and {key} of {GENAI_CONFIG} is {shown(found)}")
    check_stop_tokens(artifact, model.get("eos_token_id"), read)
