"""An onnxruntime-genai folder in memory: graph, external data, configuration, tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

GRAPH, DATA, CONFIG, TOKENIZER = "model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json"


@dataclass
class Decoder:
    """What can be changed; `files` are the other text files, by name."""

    model: Any
    data: bytearray
    config: dict[str, Any]
    tokenizer: dict[str, Any]
    files: dict[str, str]

    @property
    def layers(self) -> int:
        return int(self.config["model"]["decoder"]["num_hidden_layers"])

    @property
    def heads(self) -> tuple[int, int, int]:
        """Heads of q, of k and v, and the width of one."""
        decoder = self.config["model"]["decoder"]
        return int(decoder["num_attention_heads"]), int(decoder["num_key_value_heads"]), int(decoder["head_size"])

    def tensor(self, prefix: str) -> Any:
        """The first initializer whose name begins so; None where there is none."""
        prefix = prefix.format(first=0, last=self.layers - 1, end=self.layers)
        return next((t for t in self.model.graph.initializer if t.name.startswith(prefix)), None)

    def read(self, tensor: Any) -> NDArray[Any]:
        import onnx

        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            return np.array(onnx.numpy_helper.to_array(tensor))
        where = {entry.key: entry.value for entry in tensor.external_data}
        found = np.frombuffer(bytes(self.data), dtype, prod(tensor.dims), int(where.get("offset", 0)))
        return found.reshape(tuple(tensor.dims)).copy()

    def store(self, tensor: Any, values: NDArray[Any]) -> None:
        """Overwrite its values where they lie; the shape stays."""
        import onnx

        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
        data = np.ascontiguousarray(values).astype(dtype).tobytes()
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            tensor.ClearField("float_data")
            tensor.raw_data = data
            return
        where = {entry.key: entry.value for entry in tensor.external_data}
        offset = int(where.get("offset", 0))
        assert len(data) == prod(tensor.dims) * dtype.itemsize, tensor.name
        self.data[offset : offset + len(data)] = data

    def nodes(self, op_type: str, part: str = "") -> list[Any]:
        part = part.format(first=0, last=self.layers - 1, end=self.layers)
        return [node for node in self.model.graph.node if node.op_type == op_type and part in node.name]


def read(folder: Path) -> Decoder:
    import onnx

    text = {p.name: p.read_text(encoding="utf-8") for p in folder.iterdir() if p.suffix in (".json", ".jinja", ".txt")}
    return Decoder(
        model=onnx.load(str(folder / GRAPH), load_external_data=False),
        data=bytearray((folder / DATA).read_bytes()) if (folder / DATA).exists() else bytearray(),
        config=json.loads(text.pop(CONFIG)),
        tokenizer=json.loads(text.pop(TOKENIZER)),
        files=text,
    )


def write(decoder: Decoder, folder: Path) -> None:
    """Only what differs from what lies there."""
    _put(folder / GRAPH, decoder.model.SerializeToString())
    if decoder.data:
        _put(folder / DATA, bytes(decoder.data))
    for name, tree in ((CONFIG, decoder.config), (TOKENIZER, decoder.tokenizer)):
        if json.loads((folder / name).read_text(encoding="utf-8")) != tree:
            _put(folder / name, (json.dumps(tree, indent=2, ensure_ascii=False) + "\n").encode())
    for name, text in decoder.files.items():
        _put(folder / name, text.encode())


def _put(path: Path, data: bytes) -> None:
    if not path.exists() or path.read_bytes() != data:
        path.write_bytes(data)
