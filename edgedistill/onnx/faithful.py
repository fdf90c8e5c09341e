"""An onnxruntime-genai folder against the model folder that it was made of: weights, attributes, tables, configuration.

Legend: P positions, D half of the rotated dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgedistill.models.generation import DEFAULT_TEMPLATE, Generation, chat_templates
from edgedistill.models.shapes import shape_from_config
from edgedistill.models.weights import read_tensor, stored_tensors
from edgedistill.onnx.dequantize import HEAD, dequantized, stored
from edgedistill.onnx.generation_settings import search_settings
from edgedistill.onnx.graph import COMPUTED, EMBEDDING, load_graph, read_initializer
from edgedistill.quantization.rounding import difference
from edgedistill.records.artifact import Artifact
from edgedistill.records.finding import Finding, difference_of, shown
from edgedistill.records.shape import Shape
from edgedistill.runtimes.ort import CONFIG, genai_config
from edgedistill.strict import read_json

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

TOLERANCE = 1e-6  # of an attribute: the graph's float32
NORMS = ("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization", "RMSNormalization", "LayerNormalization")
ATTENTION = "GroupQueryAttention"
RUN_TOKENS = 32
# An angle is the product of a position and a frequency in float32.
TABLE_TOLERANCE, ANGLE_ROUNDING = 2e-5, 3e-7


def weight_findings(checkpoint: Path, folder: Path, config: Mapping[str, Any], shape: Shape) -> Iterator[Finding]:
    """Weights that are missing, too many, or others than the checkpoint's."""
    originals = stored_tensors(checkpoint)
    tied = shape.tie_word_embeddings
    missing = {name for name in originals if not name.endswith("inv_freq") and not (tied and name.startswith(HEAD))}
    for name, kind, values in stored(folder, config):
        original = originals.get(EMBEDDING if tied and name.startswith(HEAD) else name)
        missing.discard(name)
        if original is None:
            yield Finding("tensor", name, "is in the graph, and the model has no such tensor")
            continue
        said = difference(values, read_tensor(original), kind)
        if said:
            yield Finding("tensor", name, said)
    for name in sorted(missing):
        yield Finding("tensor", name, "is missing")


def graph_findings(folder: Path, config: Mapping[str, Any], shape: Shape, checkpoint: Path) -> Iterator[Finding]:
    """Attributes and tables that change what is computed."""
    graph = load_graph(folder)
    eps = float(config.get("rms_norm_eps", 1e-6))
    heads, kv_heads, scale = shape.num_attention_heads, shape.num_key_value_heads, 1 / math.sqrt(shape.head_dim)
    window = _window(config)
    layers = 0
    separate = any(node.op_type == "RotaryEmbedding" for node in graph.graph.node)
    for node in graph.graph.node:
        named = node.name or node.op_type
        if node.op_type in NORMS:
            found = _attribute(node, "epsilon", 1e-5)
            if not math.isclose(found, eps, rel_tol=TOLERANCE):
                yield Finding("metadata", f"epsilon of {named}", f"is {shown(found)}, the model's is {shown(eps)}")
        if node.op_type != ATTENTION:
            continue
        layers += 1
        wanted = {"num_heads": heads, "kv_num_heads": kv_heads, "rotary_interleaved": 0, "smooth_softmax": 0}
        if not separate:
            wanted["do_rotary"] = 1
        for key, value in wanted.items():
            if _attribute(node, key, 0) != value:
                found = _attribute(node, key, 0)
                yield Finding("metadata", f"{key} of {named}", f"is {shown(found)}, the model's is {value}")
        found = _attribute(node, "scale", 0.0) or scale
        if not math.isclose(found, scale, rel_tol=1e-5):
            yield Finding("metadata", f"scale of {named}", f"is {shown(found)}, the model's is {shown(scale)}")
        if _attribute(node, "softcap", 0.0):
            yield Finding("metadata", f"softcap of {named}", f"is {shown(_attribute(node, 'softcap', 0.0))}, not 0")
        found = _attribute(node, "local_window_size", -1)
        if found not in (-1, window):
            yield Finding("metadata", f"local_window_size of {named}", f"is {shown(found)}, the model's is {window}")
    if layers != shape.num_hidden_layers:
        yield Finding("metadata", "the graph", f"has {layers} attention layers, the model {shape.num_hidden_layers}")
    yield from _tables(graph, folder, checkpoint)


def _window(config: Mapping[str, Any]) -> int:
    size = config.get("sliding_window")
    return size if isinstance(size, int) and config.get("use_sliding_window", True) else -1


def _attribute(node: NodeProto, name: str, default: Any) -> Any:
    found = next((a for a in node.attribute if a.name == name), None)
    if found is None:
        return default
    return float(found.f) if found.type == found.FLOAT else int(found.i)


def _tables(graph: ModelProto, folder: Path, checkpoint: Path) -> Iterator[Finding]:
    """The rotary tables [P, D] that the builder computed, against transformers' frequencies."""
    tables = [t for t in graph.graph.initializer if t.name.startswith(COMPUTED)]
    if not tables:
        return
    frequencies_D, scaling = rotary(checkpoint)
    for tensor in tables:
        found_PD = read_initializer(tensor, folder).astype(np.float64)
        if found_PD.ndim != 2 or found_PD.shape[1] != len(frequencies_D):
            yield Finding("tensor", tensor.name, f"has the shape {list(found_PD.shape)}")
            continue
        positions = np.arange(len(found_PD), dtype=np.float64)
        angles_PD = positions[:, None] * frequencies_D[None]
        wanted_PD = scaling * (np.cos if tensor.name.startswith("cos") else np.sin)(angles_PD)
        away = np.abs(found_PD - wanted_PD) > TABLE_TOLERANCE + ANGLE_ROUNDING * angles_PD
        if away.any():
            at = np.unravel_index(int(np.argmax(away)), away.shape)
            yield Finding(
                "metadata", tensor.name,
                f"is not the model's rotary embedding: at position {at[0]}, pair {at[1]} it is {found_PD[at]:.6g}, the"
                f" model's {wanted_PD[at]:.6g} (rope_theta or its scaling differ)",
            )  # fmt: skip


def rotary(checkpoint: Path) -> tuple[NDArray[np.float64], float]:
    """[D] frequencies of the rotary embedding and what it is scaled by, as transformers computes them."""
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    module: Any = LlamaRotaryEmbedding(AutoConfig.from_pretrained(checkpoint, trust_remote_code=False))
    return module.inv_freq.double().numpy(), float(module.attention_scaling)


def config_findings(
    artifact: Artifact, folder: Path, checkpoint: Path, generation: Generation, runtime: Mapping[str, Any]
) -> Iterator[Finding]:
    """genai_config.json's numbers, and what the runtime made of them (RuntimeProcess.generation)."""
    config = read_json(checkpoint / "config.json", what="config.json")
    shape = shape_from_config(config, where=str(checkpoint))
    family, special = config.get("model_type"), _special(checkpoint, config, generation)
    model = genai_config(folder).get("model", {})
    decoder = model.get("decoder", {})
    wanted = {
        "head_size": shape.head_dim,
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_key_value_heads": shape.num_key_value_heads,
    }
    for key, value in wanted.items():
        if decoder.get(key) != value:
            yield Finding(
                "metadata", f"{CONFIG}: model.decoder.{key}", f"is {shown(decoder.get(key))}, the model's is {value}"
            )
    for key, expected in (("vocab_size", shape.vocab_size), ("type", family)):
        if model.get(key) != expected:
            said = f"is {shown(model.get(key))}, the model's is {shown(expected)}"
            yield Finding("metadata", f"{CONFIG}: model.{key}", said)
    for role in ("bos", "pad"):
        allowed = special[role]
        if allowed and model.get(f"{role}_token_id") not in allowed:
            said = f"is {shown(model.get(f'{role}_token_id'))}, the model's is {min(allowed)}"
            yield Finding("stops", f"{CONFIG}: model.{role}_token_id", said)
    context = model.get("context_length")
    if context != artifact.context_tokens or artifact.context_tokens > shape.max_position_embeddings:
        yield Finding(
            "context", f"{CONFIG}: model.context_length",
            f"is {shown(context)}, the artifact's is {artifact.context_tokens} of {shape.max_position_embeddings}",
        )  # fmt: skip
    found, stops = sorted(runtime["stops"]), sorted(generation.stops)
    if found != stops:
        said = ", ".join(generation.named(token) for token in found) or "nowhere"
        own = ", ".join(generation.named(token) for token in stops) or "none"
        yield Finding("stops", f"{CONFIG}: model.eos_token_id", f"stops at {said}; the model's stop tokens are {own}")
    yield from _search(artifact, generation, runtime["search"])


def _special(checkpoint: Path, config: Mapping[str, Any], generation: Generation) -> dict[str, set[int]]:
    """The ids that bos and pad may have: what any of the model's files say; the builder takes a stop token as pad."""
    found: dict[str, set[int]] = {"bos": set(), "pad": set()}
    ids = {text: token_id for token_id, text in generation.texts.items()}
    path = checkpoint / "tokenizer_config.json"
    tokenizer = read_json(path, what=path.name) if path.is_file() else {}
    for role, seen in found.items():
        named = tokenizer.get(f"{role}_token")
        named = named.get("content") if isinstance(named, dict) else named
        for value in (ids.get(str(named)), config.get(f"{role}_token_id"), generation.written.get(f"{role}_token_id")):
            if isinstance(value, int):
                seen.add(value)
    found["pad"] |= set(generation.stops)
    return found


def departures(checkpoint: Path, folder: Path, config: Mapping[str, Any]) -> Iterator[Finding]:
    """The first tensor that the graph, with its own weights and float32 products, computes otherwise than torch."""
    from edgedistill.onnx.decoder_parity import exact_departure
    from edgedistill.runtimes.parity import real_inputs
    from edgedistill.runtimes.runners import with_weights

    _, sequences = real_inputs(checkpoint, None, context_tokens=RUN_TOKENS)
    model = with_weights(checkpoint, dequantized(folder, config))
    found = exact_departure(model, checkpoint, folder, sequences[0])
    if found is not None:
        yield Finding("metadata", found[0], found[1])


def _search(artifact: Artifact, generation: Generation, found: Mapping[str, Any]) -> Iterator[Finding]:
    for key, wanted in search_settings(generation.settings, artifact.context_tokens).items():
        value = found.get(key)
        same = math.isclose(value, wanted, rel_tol=TOLERANCE) if isinstance(value, int | float) else value == wanted
        if not same:
            yield Finding("settings", f"{CONFIG}: search.{key}", f"is {shown(value)}, the model's is {shown(wanted)}")


def file_findings(folder: Path, checkpoint: Path) -> Iterator[Finding]:
    """A folder's tokenizer and templates, which are the checkpoint's own files."""
    ours, theirs = folder / "tokenizer.json", checkpoint / "tokenizer.json"
    if theirs.is_file():
        if not ours.is_file():
            yield Finding("tokenizer", "tokenizer.json", "is missing")
        elif ours.read_bytes() != theirs.read_bytes():
            yield Finding("tokenizer", "tokenizer.json", "is not the model's")
    found, wanted = chat_templates(folder), chat_templates(checkpoint)
    # A named one may stay behind (a folder beside the files), and is the model's where it does not.
    for name in sorted(found.keys() | {DEFAULT_TEMPLATE}):
        if found.get(name, "") != wanted.get(name, ""):
            said = difference_of(found.get(name, ""), wanted.get(name, ""))
            yield Finding("template", f"chat template {name!r}", said)
