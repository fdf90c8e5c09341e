"""Any ONNX graph in a child process: named arrays in, named arrays out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from edgedistill.errors import UserError
from edgedistill.runtimes.bounds import OWN
from edgedistill.runtimes.child import Child
from edgedistill.runtimes.room import GRAPH, room_for

if TYPE_CHECKING:
    from edgedistill.quantization.histogram import Observed


class GraphProcess:
    """A graph open in a child process. A context manager. Raises RuntimeCrashed, UserError.

    `spin`: waiting threads spin as onnxruntime has it, where speed is measured.
    """

    def __init__(
        self, path: Path, *, threads: int, optimize: bool = True, timeout_s: float = 900.0, spin: bool = False
    ) -> None:
        path = path.absolute()
        if not path.is_file():
            raise UserError(f"no graph {path}", "give an .onnx or .ort file")
        self._room = room_for(GRAPH, path, OWN, context_tokens=0, threads=threads, spin=spin)
        try:
            self._child = Child(runtime="onnxruntime", artifact=path, timeout_s=timeout_s, room=self._room)
        except BaseException:
            self._room.close()
            raise
        try:
            self.info = self._child.call(
                "open_graph", "opening", {"path": str(self._room.path()), "threads": threads, "optimize": optimize}
            )
            self._room.require_unchanged()
        except BaseException:
            self.close()
            raise

    @property
    def outputs(self) -> Sequence[str]:
        names: list[str] = self.info["outputs"]
        return names

    def run(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """All outputs of one run; float16 and bfloat16 ones as float32."""
        frame = next(self._child.stream("run_graph", "a run", {}, dict(arrays)))
        return frame[1]

    def timed(self, arrays: Mapping[str, NDArray[Any]], repeats: int) -> list[float]:
        """Milliseconds of each of so many runs, measured in the child."""
        found: list[float] = self._child.call("time_graph", "timed runs", {"repeats": repeats}, dict(arrays))["ms"]
        return found

    def observe_begin(self, names: Sequence[str]) -> None:
        """From now on `observe` notes the extremes of these outputs."""
        self._child.call("observe_begin", "opening", {"names": list(names)})

    def observe_bins(self) -> None:
        """From now on `observe` counts in bins as wide as the extremes."""
        self._child.call("observe_bins", "opening", {})

    def observe(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """One run whose outputs stay in the child. Positions where `attention_mask` is 0 are not looked at."""
        self._child.call("observe", "a calibration run", {}, dict(arrays))

    def observed(self) -> dict[str, Observed]:
        """What was seen of each output."""
        from edgedistill.quantization.histogram import Observed

        header, counts = next(self._child.stream("observed", "ranges", {}))
        return {name: Observed(**row, counts=counts[name]) for name, row in header["rows"].items()}

    def peak_rss_bytes(self) -> int:
        """The most memory that the child ever had resident."""
        return int(self._child.call("peak_rss", "memory", {})["bytes"])

    def close(self) -> None:
        self._child.close()
        self._room.close()

    def __enter__(self) -> GraphProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._child.kill()
        self.close()
