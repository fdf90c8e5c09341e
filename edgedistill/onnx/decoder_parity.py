"""An ONNX decoder against its torch model: weights first, then logits; where these depart, the first tensor that does.

Nodes are told by the weights that they take, which carry the builder's names of the modules they came from.

Legend: T tokens.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgedistill.errors import UserError
from edgedistill.models.shapes import shape_from_config
from edgedistill.models.weights import read_tensor, stored_tensors
from edgedistill.onnx.dequantize import HEAD, dequantized, modules_of, stored
from edgedistill.onnx.graph import EMBEDDING, MODEL_FILE, load_graph
from edgedistill.records.artifact import Parity
from edgedistill.runtimes.graph import GraphProcess
from edgedistill.runtimes.ort import CONFIG, genai_config
from edgedistill.runtimes.process import RuntimeProcess
from edgedistill.strict import read_json

if TYPE_CHECKING:
    from onnx import ModelProto

# Relative error (root mean square) of the logits against torch fp32: with the original weights (FP32), or with the
# weights that the graph stores, where it also rounds the activations to 8 bits a block (INT8, INT4). Seen on random
# models of llama, qwen2 and qwen3: 6e-7 to 1e-6, and 0.026 to 0.040. A wrong rotary embedding or layout costs about 1.
LIMITS = {"FP32": 1e-4, "INT8": 0.2, "INT4": 0.2}
PAST, PRESENT = "past_key_values.%d.", "present.%d."  # where genai_config.json does not name them
EXACT_LIMIT = 1e-3  # of a graph whose products are in float32: seen are 1e-7 to 1e-5
ATTENTION = "GroupQueryAttention"
LOOKUPS = ("Gather", "GatherBlockQuantized")  # of the tokens, in a table that may be the head's


def check_decoder(
    checkpoint: Path,
    folder: Path,
    *,
    quantization: str,
    context_tokens: int,
    calibration: Sequence[Sequence[str]] | None = None,
    threads: int = 1,
) -> Parity:
    """Hold an onnxruntime-genai folder to the checkpoint that it was made of.

    Raises UserError where a stored weight is not the checkpoint's, or onnxruntime's logits are not torch's; the error
    names the first tensor that departs. RuntimeCrashed where the runtime dies.
    """
    from edgedistill.runtimes.parity import INVALID, measure, real_inputs
    from edgedistill.runtimes.runners import load_torch, with_weights

    check_weights(checkpoint, folder)
    config = read_json(checkpoint / "config.json", what="config.json")
    name, sequences = real_inputs(checkpoint, calibration, context_tokens=context_tokens)
    limit, exact = LIMITS[quantization], quantization == "FP32"
    model = load_torch(checkpoint) if exact else with_weights(checkpoint, dequantized(folder, config))
    with RuntimeProcess("onnxruntime-genai", folder, threads=threads, context_tokens=context_tokens) as process:
        parity = measure(
            model, sequences, inputs=name, reference="original" if exact else "stored", limit=limit,
            runtime=str(process.info["runtime_version"]), context_tokens=context_tokens, logits=process.logits,
            greedy=process.greedy,
        )  # fmt: skip
    if not parity.relative_rms <= limit:
        raise UserError(
            f"{MODEL_FILE} ({quantization}): onnxruntime's logits differ from torch's by {parity.relative_rms:.3g} of"
            f" their spread, more than {limit:g}; {first_departure(model, checkpoint, folder, sequences[0], limit)}",
            INVALID,
        )
    return parity


def check_weights(checkpoint: Path, folder: Path) -> None:
    """Every stored weight against the checkpoint's, one at a time, in the graph's order.

    Raises UserError that names the first one whose scale, or what is left beside it, is no rounding; or one that the
    graph lacks.
    """
    from edgedistill.runtimes.parity import INVALID, weight_difference

    config = read_json(checkpoint / "config.json", what="config.json")
    originals = stored_tensors(checkpoint)
    tied = shape_from_config(config, where=str(checkpoint)).tie_word_embeddings
    missing = {name for name in originals if not name.endswith("inv_freq") and not (tied and name.startswith(HEAD))}
    for name, kind, values in stored(folder, config):
        original = originals.get(EMBEDDING if tied and name.startswith(HEAD) else name)
        if original is None:
            raise UserError(f"{MODEL_FILE} holds {name}, which {checkpoint} does not have", INVALID)
        missing.discard(name)
        said = weight_difference(values, read_tensor(original), exact=kind.startswith("FP"))
        if said:
            raise UserError(f"{MODEL_FILE}: {name} ({kind}) is not the checkpoint's: {said}", INVALID)
    if missing:
        raise UserError(f"{MODEL_FILE} lacks {sorted(missing)[0]} of {checkpoint}", INVALID)


def first_departure(model: Any, checkpoint: Path, folder: Path, ids_T: NDArray[np.int64], limit: float) -> str:
    """Which of the graph's tensors, in the order of the computation, is the first to differ beyond `limit`."""
    from edgedistill.runtimes.parity import Differences

    expected = torch_outputs(model, ids_T)
    previous = "the graph's inputs"
    for tensor, modules, values in traced(checkpoint, folder, ids_T):
        found = values.reshape(len(ids_T), -1)
        wanted = np.concatenate([expected[module] for module in modules], axis=1)
        if found.shape != wanted.shape:
            return f"{tensor} is {list(found.shape)}, {' + '.join(modules)} of torch {list(wanted.shape)}"
        differences = Differences()
        differences.add(found, wanted)
        if not differences.relative_rms <= limit:
            return (
                f"the first tensor that departs is {tensor} ({' + '.join(modules)}), by"
                f" {differences.relative_rms:.3g}; all before it, up to {previous}, agree"
            )
        previous = tensor
    return f"no tensor before the logits departs by more than {limit:g}: the difference grows from layer to layer"


def traced(
    checkpoint: Path, folder: Path, ids_T: NDArray[np.int64]
) -> list[tuple[str, tuple[str, ...], NDArray[np.float32]]]:
    """(tensor, the torch modules whose output it is, its values), in the graph's order, run without optimizations.

    "NAME <" stands for the input of a module: attention's output is that of its output projection.
    """
    named, found, _ = _exposed(checkpoint, folder, ids_T, exact=False)
    return [(tensor, modules, found[tensor]) for tensor, modules in named]


def exact_departure(model: Any, checkpoint: Path, folder: Path, ids_T: NDArray[np.int64]) -> tuple[str, str] | None:
    """The first tensor of the graph that is not torch's, and by how much; None where the logits are.

    Products are computed in float32 (without the rounding of activations that INT8 and INT4 graphs ask for), so that
    with the stored weights in `model` nothing but the order of sums is left: what is planted in a graph, a scale, a
    missing sum, another operator, shows beyond EXACT_LIMIT. The second half of the tokens is computed again from the
    first half's cache: what is wrong with a cache shows in no run of a whole text.
    """
    from edgedistill.runtimes.parity import Differences, torch_logits

    named, found, continued = _exposed(checkpoint, folder, ids_T, exact=True)
    expected = torch_outputs(model, ids_T)
    compared = [(tensor, " + ".join(m), [expected[module] for module in m]) for tensor, m in named]
    compared.append(("logits", "the model's logits", [torch_logits(model, ids_T)]))
    for tensor, what, parts in compared:
        rows, wanted = found[tensor].reshape(len(ids_T), -1), np.concatenate(parts, axis=1)
        if rows.shape != wanted.shape:
            return tensor, f"is {list(rows.shape)}, {what} of torch {list(wanted.shape)}"
        differences = Differences()
        differences.add(rows, wanted)
        if not differences.relative_rms <= EXACT_LIMIT:
            return tensor, f"is the first that departs from torch ({what}), by {differences.relative_rms:.3g}"
    for name, values in sorted(continued.items(), key=lambda item: item[0] == "logits"):
        whole = found[name][:, -values.shape[1] :] if name == "logits" else found[name]
        differences = Differences()
        if whole.shape == values.shape:
            differences.add(values, whole)
        if whole.shape != values.shape or not differences.relative_rms <= EXACT_LIMIT:
            return (
                name,
                "is another where the text's beginning is read from the cache: tokens decoded one by one differ",
            )
    return None


def _exposed(
    checkpoint: Path, folder: Path, ids_T: NDArray[np.int64], *, exact: bool
) -> tuple[list[tuple[str, tuple[str, ...]]], dict[str, NDArray[np.float32]], dict[str, NDArray[np.float32]]]:
    """The named tensors of a graph, and every output of it with these exposed, run without optimizations.

    Last, where `exact`: logits and caches of the second half of the tokens, run with the first half's cache.
    """
    import onnx

    graph = load_graph(folder)
    named = _named_tensors(graph)
    known = {value.name for value in graph.graph.output}
    graph.graph.output.extend(onnx.ValueInfoProto(name=tensor) for tensor, _ in named if tensor not in known)
    for node in graph.graph.node if exact else ():
        if node.op_type == "MatMulNBits":
            kept = [attribute for attribute in node.attribute if attribute.name != "accuracy_level"]
            del node.attribute[:]
            node.attribute.extend(kept)
    shape = shape_from_config(read_json(checkpoint / "config.json", what="config.json"), where=str(checkpoint))
    with tempfile.TemporaryDirectory(dir=folder.absolute().parent, prefix=".exposed.") as scratch:
        # ONNX Runtime wants the data beside the graph, and an artifact's own folder is not written to.
        for data in folder.glob(f"{MODEL_FILE}.*"):
            try:
                os.link(data, Path(scratch) / data.name)
            except OSError:
                shutil.copyfile(data, Path(scratch) / data.name)
        exposed = Path(scratch) / MODEL_FILE
        exposed.write_bytes(graph.SerializeToString())
        with GraphProcess(exposed, threads=1, optimize=False) as process:
            half = len(ids_T) // 2
            empty = np.zeros((1, shape.num_key_value_heads, 0, shape.head_dim), dtype=np.float32)
            presents = _presents(graph, folder)
            found = dict(process.run(_feeds(graph, ids_T, dict.fromkeys(presents, empty))))
            if not exact or not presents or not half:
                return named, found, {}
            first = process.run(_feeds(graph, ids_T[:half], dict.fromkeys(presents, empty)))
            past = {name: first[present] for name, present in presents.items()}
            second = process.run(_feeds(graph, ids_T[half:], past))
            return named, found, {name: second[name] for name in ("logits", *presents.values())}


def torch_outputs(model: Any, ids_T: NDArray[np.int64]) -> Mapping[str, NDArray[np.float32]]:
    """Module name → its output [T, width], and "NAME <" → its input, where that is one tensor of floats."""
    import torch

    kept: dict[str, NDArray[np.float32]] = {}

    def keep(name: str) -> Any:
        def hook(_module: Any, inputs: Any, output: Any) -> None:
            for key, value in ((f"{name} <", inputs[0] if inputs else None), (name, output)):
                if isinstance(value, torch.Tensor) and value.is_floating_point():
                    kept[key] = value.detach().float().cpu().numpy().reshape(len(ids_T), -1).copy()

        return hook

    handles = [
        module.register_forward_hook(keep(name))
        for name, module in model.named_modules()
        if next(module.children(), None) is None and next(module.parameters(), None) is not None
    ]
    try:
        with torch.no_grad():
            model(input_ids=torch.from_numpy(ids_T)[None].to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return kept


def _named_tensors(graph: ModelProto) -> list[tuple[str, tuple[str, ...]]]:
    """(tensor, modules of torch) of the last node that takes a weight of these modules, in the graph's order."""
    last: dict[tuple[str, ...], tuple[int, str]] = {}
    initializers = {tensor.name for tensor in graph.graph.initializer}
    layer = 0
    for index, node in enumerate(graph.graph.node):
        if node.op_type == ATTENTION:
            last[(f"model.layers.{layer}.self_attn.o_proj <",)] = (index, node.output[0])
            layer += 1
            continue
        if node.op_type in LOOKUPS and "input_ids" in node.input:
            last[modules_of(EMBEDDING)] = (index, node.output[0])
            continue
        for name in node.input:
            modules = modules_of(name) if name in initializers else ()
            if modules:
                last[modules] = (index, node.output[0])
                break
    return [(tensor, modules) for modules, (_, tensor) in sorted(last.items(), key=lambda item: item[1][0])]


def _presents(graph: ModelProto, folder: Path) -> dict[str, str]:
    """The graph's input that holds a cache → the output that is fed to it at the next token, as genai_config.json says.

    Raises UserError where that names what the graph has not.
    """
    decoder = genai_config(folder).get("model", {}).get("decoder", {})
    taken, given = decoder.get("inputs", {}), decoder.get("outputs", {})
    inputs, outputs = ({value.name for value in side} for side in (graph.graph.input, graph.graph.output))
    found = {}
    for layer in range(int(decoder.get("num_hidden_layers", 0))):
        for part in ("key", "value"):
            past, present = (
                taken.get(f"past_{part}_names", PAST + part),
                given.get(f"present_{part}_names", PRESENT + part),
            )
            found[past.replace("%d", str(layer))] = present.replace("%d", str(layer))
    caches = {name for name in inputs if name.startswith("past_key_values.")}
    if caches != set(found) or not outputs.issuperset(found.values()):
        odd = sorted((caches ^ set(found)) | (set(found.values()) - outputs))[0]
        raise UserError(f"{CONFIG} and {MODEL_FILE} do not have the same caches: {odd}", "export the artifact again")
    return found


def _feeds(graph: ModelProto, ids_T: NDArray[np.int64], past: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The graph's inputs for tokens that follow those in the cache."""
    import onnx

    filled = next((values.shape[2] for values in past.values()), 0)
    known = {
        "input_ids": ids_T[None],
        "attention_mask": np.ones((1, filled + len(ids_T)), dtype=np.int64),
        "position_ids": np.arange(filled, filled + len(ids_T))[None],
        **past,
    }
    return {
        value.name: known[value.name].astype(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))
        for value in graph.graph.input
        if value.name in known
    }
