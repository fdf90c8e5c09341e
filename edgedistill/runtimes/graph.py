"""Any ONNX graph in a child process: named arrays in, named arrays out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from numpy.typing import NDArray

from edgedistill.errors import UserError
from edgedistill.runtimes.child import Child


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
