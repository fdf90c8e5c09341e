"""onnxruntime, in the child process: any graph with named arrays, or a decoder with its KV cache as inputs and outputs.

What the graph needs is read from its inputs: `input_ids`, and where it has them `attention_mask`,
`position_ids` and `past_key_values.*`, whose `present.*` outputs are fed back.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgedistill.errors import UserError
from edgedistill.machine import waiting
from edgedistill.quantization.histogram import Observed, observe
from edgedistill.runtimes.backend import greedy_timed

DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}
PAST = "past_key_values"
PRESENT = "present"
CONFIG = "genai_config.json"
FRAME_TYPES = (np.float32, np.int32, np.int64)


def model_file(artifact: Path) -> Path:
    """The .onnx file of an artifact: itself, or model.onnx in a folder. Raises UserError."""
    path = artifact / "model.onnx" if artifact.is_dir() else artifact
    if not path.is_file():
        raise UserError(f"no ONNX model {path}", "give an .onnx file, or a folder that holds model.onnx")
    return path


def genai_config(folder: Path) -> dict[str, Any]:
    """genai_config.json of a folder, empty where there is none. Raises UserError where it cannot be read."""
    path = folder / CONFIG
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {error}", "export the artifact again") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} holds a {type(config).__name__} and not an object", "export the artifact again")
    return config


class OrtBackend:
    """An ONNX decoder open in onnxruntime on the CPU."""

    def __init__(
        self, artifact: Path, *, threads: int, context_tokens: int, use_extra_bufts: bool, logits_all: bool
    ) -> None:
        del use_extra_bufts, logits_all  # llama.cpp's
        import onnxruntime

        path = model_file(artifact)
        self._version = onnxruntime.__version__
        self._threads = threads
        self.context_tokens = context_tokens
        self._decoder = genai_config(path.parent).get("model", {}).get("decoder", {})
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        if waiting.sleeps_soon():
            options.add_session_config_entry(waiting.ONNXRUNTIME_SPINS, "0")
        started = time.perf_counter()
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        # onnxruntime's exceptions share no base class.
        except Exception as error:
            raise UserError(
                f"onnxruntime cannot open {path} ({path.stat().st_size} bytes): {str(error)[:500]}",
                "the model or its external data is damaged or cut short: export it again",
            ) from error
        self.load_ms = (time.perf_counter() - started) * 1e3
        self._inputs = {node.name: node for node in self._session.get_inputs()}
        self._output_names = [node.name for node in self._session.get_outputs()]
        self.vocab_size = self._vocabulary(path)
        self._past_names = [name for name in self._inputs if name.startswith(PAST)]
        known = {"input_ids", "attention_mask", "position_ids", *self._past_names}
        if "input_ids" not in self._inputs or set(self._inputs) - known:
            raise UserError(
                f"{path} has the inputs {', '.join(self._inputs)}",
                f"a decoder takes input_ids and may take attention_mask, position_ids and {PAST}.*",
            )
        self._empty = {name: self._empty_past(name) for name in self._past_names}

    def _vocabulary(self, path: Path) -> int:
        for node in self._session.get_outputs():
            if node.name == "logits" and isinstance(node.shape[-1], int):
                return int(node.shape[-1])
        raise UserError(f"{path} has no output `logits` of a known vocabulary", "export it as a causal decoder")

    def _empty_past(self, name: str) -> NDArray[Any]:
        """A cache of no tokens, [1, KV heads, 0, head size]; symbolic sizes are taken from genai_config.json."""
        node = self._inputs[name]
        heads, width = node.shape[1], node.shape[3]
        heads = heads if isinstance(heads, int) else self._decoder.get("num_key_value_heads")
        width = width if isinstance(width, int) else self._decoder.get("head_size")
        if not isinstance(heads, int) or not isinstance(width, int) or node.type not in DTYPES:
            raise UserError(
                f"the cache input {name} is {node.type} {node.shape}, of unknown size",
                f"keep {CONFIG} beside the model: it holds the heads and their size",
            )
        return np.zeros((1, heads, 0, width), dtype=DTYPES[node.type])

    def info(self) -> dict[str, Any]:
        return {
            "runtime": "onnxruntime",
            "runtime_version": f"onnxruntime {self._version}",
            "vocab_size": self.vocab_size,
            "context_tokens": self.context_tokens,
            "load_ms": self.load_ms,
            "options": {
                "threads": self._threads,
                "providers": self._session.get_providers(),
                "spins": not waiting.sleeps_soon(),
            },
        }

    def logits(self, tokens_T: NDArray[np.int32]) -> Iterator[NDArray[np.float32]]:
        rows, _ = self._run(tokens_T, self._empty, 0, ["logits"])
        yield rows

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        raise UserError("onnxruntime has no tokenizer", "tokenize with the runtime onnxruntime-genai")

    def timed(self, tokens_T: NDArray[np.int32], new_tokens: int) -> dict[str, Any]:
        cache, filled = self._empty, 0

        def step(tokens: Sequence[int]) -> NDArray[np.float32]:
            nonlocal cache, filled
            rows, cache = self._run(np.asarray(tokens, dtype=np.int32), cache, filled, self._output_names)
            filled += len(tokens)
            last: NDArray[np.float32] = rows[-1]
            return last

        if not self._past_names:
            raise UserError("the ONNX model has no KV cache", "time a decoder that was exported with past_key_values")
        return greedy_timed(step, [int(t) for t in tokens_T], new_tokens)

    def _run(
        self, tokens_T: NDArray[np.int32], cache: dict[str, NDArray[Any]], filled: int, outputs: list[str]
    ) -> tuple[NDArray[np.float32], dict[str, NDArray[Any]]]:
        """Logits [T, V] of tokens that follow `filled` ones, and the cache after them (of the outputs asked for)."""
        count = len(tokens_T)
        offered: dict[str, NDArray[Any]] = {
            "input_ids": tokens_T[None],
            "attention_mask": np.ones((1, filled + count)),
            "position_ids": np.arange(filled, filled + count)[None],
        }
        feeds = {
            name: array.astype(DTYPES[self._inputs[name].type])
            for name, array in offered.items()
            if name in self._inputs
        }
        found = dict(zip(outputs, self._session.run(outputs, feeds | cache), strict=True))
        rows = np.asarray(found["logits"][0], dtype=np.float32)
        if rows.shape != (count, self.vocab_size):
            raise UserError(
                f"the model gives logits of shape {list(rows.shape)} for {count} tokens",
                "export it so that it keeps the logits of every position",
            )
        after = {name.replace(PRESENT, PAST, 1): value for name, value in found.items() if name.startswith(PRESENT)}
        return rows, after


class GraphSession:
    """A graph open in onnxruntime on the CPU; what runs in the child. `optimize` False: run the nodes as they are."""

    def __init__(self, path: Path, *, threads: int, optimize: bool) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        if waiting.sleeps_soon():
            options.add_session_config_entry(waiting.ONNXRUNTIME_SPINS, "0")
        if not optimize:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        # onnxruntime's exceptions share no base class.
        except Exception as error:
            raise UserError(
                f"onnxruntime cannot open {path} ({path.stat().st_size} bytes): {str(error)[:500]}",
                "the graph is damaged, or has an operator that this onnxruntime lacks: export it again",
            ) from error
        self._inputs = {node.name: (node.type, list(node.shape)) for node in self._session.get_inputs()}
        self._outputs = [node.name for node in self._session.get_outputs()]
        self._version = onnxruntime.__version__
        self._seen: dict[str, Observed] = {}

    def info(self) -> dict[str, Any]:
        return {
            "runtime_version": f"onnxruntime {self._version}",
            "inputs": {name: {"type": kind, "shape": shape} for name, (kind, shape) in self._inputs.items()},
            "outputs": self._outputs,
        }

    def run(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Every output; floats as float32, which frames carry. UserError for inputs that are not the graph's."""
        if set(arrays) != set(self._inputs):
            raise UserError(
                f"the inputs {', '.join(sorted(arrays))} were given", f"the graph takes {', '.join(self._inputs)}"
            )
        found = self._session.run(self._outputs, dict(arrays))
        return {
            name: value if value.dtype in FRAME_TYPES else value.astype(np.float32)
            for name, value in zip(self._outputs, found, strict=True)
        }

    def timed(self, arrays: Mapping[str, NDArray[Any]], repeats: int) -> list[float]:
        """Milliseconds of each run."""
        feeds = dict(arrays)
        found = []
        for _ in range(repeats):
            started = time.perf_counter_ns()
            self._session.run(self._outputs, feeds)
            found.append((time.perf_counter_ns() - started) / 1e6)
        return found

    def observe_begin(self, names: Sequence[str]) -> None:
        self._seen = {name: Observed() for name in names}

    def observe_bins(self) -> None:
        for seen in self._seen.values():
            seen.begin_bins()

    def observe(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """One run, whose outputs are looked at and dropped."""
        names = list(self._seen)
        found = dict(zip(names, self._session.run(names, dict(arrays)), strict=True))
        observe(self._seen, found, arrays.get("attention_mask"))

    def observed(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """What was seen of each tensor: the header of a frame, and its counts."""
        rows = {
            name: {"low": s.low, "high": s.high, "values": s.values, "finite": s.finite, "amplitude": s.amplitude}
            for name, s in self._seen.items()
        }
        return {"rows": rows}, {name: s.counts for name, s in self._seen.items()}
