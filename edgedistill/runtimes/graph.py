"""Any ONNX graph in a child process: named arrays in, named arrays out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgedistill.errors import UserError
from edgedistill.runtimes.child import Child
from edgedistill.runtimes.frames import Array

FRAME_TYPES = (np.float32, np.int32, np.int64)


class GraphSession:
    """A graph open in onnxruntime on the CPU; what runs in the child. `optimize` False: run the nodes as they are."""

    def __init__(self, path: Path, *, threads: int, optimize: bool) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
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

    def info(self) -> dict[str, Any]:
        return {
            "runtime_version": f"onnxruntime {self._version}",
            "inputs": {name: {"type": kind, "shape": shape} for name, (kind, shape) in self._inputs.items()},
            "outputs": self._outputs,
        }

    def run(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
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


class GraphProcess:
    """A graph open in a child process. A context manager. Raises RuntimeCrashed, UserError."""

    def __init__(self, path: Path, *, threads: int, optimize: bool = True, timeout_s: float = 900.0) -> None:
        path = path.absolute()
        if not path.is_file():
            raise UserError(f"no graph {path}", "give an .onnx or .ort file")
        self._child = Child(runtime="onnxruntime", artifact=path, timeout_s=timeout_s)
        try:
            self.info = self._child.call(
                "open_graph", "opening", {"path": str(path), "threads": threads, "optimize": optimize}
            )
        except BaseException:
            self._child.close()
            raise

    @property
    def outputs(self) -> Sequence[str]:
        names: list[str] = self.info["outputs"]
        return names

    def run(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """All outputs of one run; float16 and bfloat16 ones as float32."""
        frame = next(self._child.stream("run_graph", "a run", {}, dict(arrays)))
        return frame[1]

    def close(self) -> None:
        self._child.close()

    def __enter__(self) -> GraphProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._child.kill()
        self.close()
