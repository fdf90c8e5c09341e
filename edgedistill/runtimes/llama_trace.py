"""What llama.cpp computes on the way, tensor by tensor, in the child process.

ggml's scheduler asks `cb_eval` before each node whether it is wanted (ask), and calls again with the node computed.
The structure of a node is read through ggml's own functions, never by an offset of ours.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FLOAT32 = 0  # GGML_TYPE_F32


class Tracer:
    """Collects the float32 nodes of these names. A name that stands for several nodes in turn is kept several times."""

    def __init__(self, names: Collection[str]) -> None:
        import llama_cpp

        self.wanted = {name.encode() for name in names}
        self.found: list[tuple[str, NDArray[np.float32]]] = []
        self._ggml = _ggml(Path(llama_cpp.__file__).parent / "lib")
        # The object must outlive every call: C holds only its address.
        self.callback = llama_cpp.llama_cpp.ggml_backend_sched_eval_callback(self._take)

    def _take(self, tensor: int, ask: bool, _user_data: Any) -> bool:
        name = self._ggml.ggml_get_name(tensor)
        if name not in self.wanted:
            return not ask
        if not ask:
            count = self._ggml.ggml_nelements(tensor)
            values = np.empty(count, dtype=np.float32)
            # a view that is not contiguous, or of another type, has another number of bytes
            if self._ggml.ggml_nbytes(tensor) == values.nbytes and self._ggml.ggml_is_contiguous(tensor):
                self._ggml.ggml_backend_tensor_get(tensor, values.ctypes.data, 0, values.nbytes)
                self.found.append((name.decode(), values))
        return True

    def taken(self) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """What was computed since the last call, in its order."""
        found, self.found = self.found, []
        yield from found


def _ggml(folder: Path) -> Any:
    """ggml's own library as llama-cpp-python loaded it, with the types of what is called here."""
    for name in ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll"):
        if (folder / name).exists():
            library = ctypes.CDLL(str(folder / name))
            break
    else:
        raise FileNotFoundError(f"no ggml-base library in {folder}")
    library.ggml_get_name.argtypes, library.ggml_get_name.restype = [ctypes.c_void_p], ctypes.c_char_p
    library.ggml_nelements.argtypes, library.ggml_nelements.restype = [ctypes.c_void_p], ctypes.c_int64
    library.ggml_nbytes.argtypes, library.ggml_nbytes.restype = [ctypes.c_void_p], ctypes.c_size_t
    library.ggml_is_contiguous.argtypes, library.ggml_is_contiguous.restype = [ctypes.c_void_p], ctypes.c_bool
    library.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    library.ggml_backend_tensor_get.restype = None
    return library
