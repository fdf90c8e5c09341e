"""What artifacts may say to their runtimes: honest ones pass (elsewhere), and each of these is refused by its name."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
import pytest
import torch
from attack.reseal import reseal
from bundle_fixtures import Ingredients
from command import Command, refused
from onnx import TensorProto, helper
from tiny_models import tiny_checkpoint, tiny_genai, tiny_gguf

from edgedistill.errors import UserError
from edgedistill.guards.gguf import check_gguf, check_ggufs
from edgedistill.guards.onnx_model import check_onnx
from edgedistill.guards.tokenizer import check_tokenizer_json, rebuilt_tokenizer_config
from edgedistill.guards.transformers_folder import rebuilt_folder
from edgedistill.runtimes.bounds import replay_of
from edgedistill.runtimes.process import RuntimeProcess

Tree = dict[str, Any]
LIBRARY = '#include <stdio.h>\n__attribute__((constructor)) static void ran(void) { fclose(fopen("%s", "w")); }\n'


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def int4(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_genai(checkpoint, tmp_path_factory.mktemp("onnx") / "int4", precision="int4")


@pytest.fixture(scope="module")
def f32(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf(checkpoint, tmp_path_factory.mktemp("gguf") / "f32.gguf")


@pytest.fixture
def folder(int4: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(int4, tmp_path / "model"))


def opening(runtime: str, artifact: Path) -> str:
    """What is said where the artifact is refused."""
    with pytest.raises(UserError) as caught:
        RuntimeProcess(runtime, artifact, threads=1, context_tokens=64, use_extra_bufts=False, bounds=replay_of(100))
    return caught.value.cause


def edited(path: Path, change: Callable[[Tree], object]) -> None:
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


# genai_config.json


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A library that leaves a mark when it is loaded, and where the mark would be."""
    place = tmp_path_factory.mktemp("library")
    mark = place / "ran"
    (place / "ops.c").write_text(LIBRARY % mark)
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", place / "ops.so", place / "ops.c"], check=True)
    subprocess.run([sys.executable, "-c", "import ctypes, sys; ctypes.CDLL(sys.argv[1])", place / "ops.so"], check=True)
    assert mark.exists(), "loading it leaves the mark"
    mark.unlink()
    return place / "ops.so", mark


CODE_PLACES: dict[str, Callable[[Tree, str], object]] = {
    "decoder": lambda c, so: c["model"]["decoder"]["session_options"].update(custom_ops_library=so),
    "model": lambda c, so: c["model"].update(session_options={"custom_ops_library": so}),
    "encoder": lambda c, so: c["model"].update(
        encoder={"filename": "model.onnx", "session_options": {"custom_ops_library": so}}
    ),
    "embedding": lambda c, so: c["model"].update(
        embedding={"filename": "model.onnx", "session_options": {"custom_ops_library": so}}
    ),
    "vision": lambda c, so: c["model"].update(
        vision={"filename": "model.onnx", "session_options": {"custom_ops_library": so}}
    ),
    "pipeline": lambda c, so: c["model"]["decoder"].update(
        pipeline=[{"a": {"filename": "model.onnx", "session_options": {"custom_ops_library": so}}}]
    ),
    "run_options": lambda c, so: c["model"]["decoder"].update(run_options={"custom_ops_library": so}),
    "top": lambda c, so: c.update(session_options={"custom_ops_library": so}),
    "provider": lambda c, so: c["model"]["decoder"]["session_options"].update(
        provider_options=[{"OpenVINO": {"load_config": so}}]
    ),
    "entries": lambda c, so: c["model"]["decoder"]["session_options"].update(config_entries={"ep.plugin.library": so}),
    "plugin": lambda c, so: c["model"]["decoder"]["session_options"].update({"ep_library": so}),
}


@pytest.mark.parametrize("where", CODE_PLACES)
def test_no_library_is_loaded(where: str, folder: Path, library: tuple[Path, Path]) -> None:
    so, mark = library
    shutil.copyfile(so, folder / "ops.so")
    for named in ("ops.so", str(so)):
        fresh = json.loads((folder / "genai_config.json").read_text())
        CODE_PLACES[where](fresh, named)
        (folder / "genai_config.json").write_text(json.dumps(fresh))
        assert "is not among what is allowed there" in (said := opening("onnxruntime-genai", folder)) or "list" in said
    assert not mark.exists()


SETTINGS: dict[str, tuple[Callable[[Tree], object], str]] = {
    "profiling": (lambda c: c["model"]["decoder"]["session_options"].update(enable_profiling="/tmp/p"), "profiling"),
    "log": (lambda c: c["model"]["decoder"]["session_options"].update(log_id="a\x1b[31m"), "log_id"),
    "printf": (lambda c: c["model"]["decoder"]["inputs"].update(past_key_names="%s%n%d"), "past_key_names"),
    "printf twice": (lambda c: c["model"]["decoder"]["outputs"].update(present_key_names="p.%d.%d"), "present_key"),
    "traversal": (lambda c: c["model"]["decoder"].update(filename="../model.onnx"), "filename"),
    "absolute": (lambda c: c["model"]["decoder"].update(filename="/etc/passwd"), "filename"),
    "layers": (lambda c: c["model"]["decoder"].update(num_hidden_layers=10**9), "num_hidden_layers"),
    "vocabulary": (lambda c: c["model"].update(vocab_size=10**12), "vocab_size"),
    "negative": (lambda c: c["model"].update(context_length=-1), "context_length"),
    "truth for a number": (lambda c: c["model"].update(vocab_size=True), "vocab_size"),
    "text for a number": (lambda c: c["model"].update(vocab_size="263"), "vocab_size"),
    "beams": (lambda c: c["search"].update(num_beams=10**6), "num_beams"),
    "new key": (lambda c: c.update(engine={}), "engine"),
    "no decoder": (lambda c: c["model"].pop("decoder"), "decoder"),
}


@pytest.mark.parametrize("what", SETTINGS)
def test_settings_that_are_not_allowed(what: str, folder: Path) -> None:
    change, named = SETTINGS[what]
    edited(folder / "genai_config.json", change)
    said = opening("onnxruntime-genai", folder)
    assert named in said and "\x1b" not in said


@pytest.mark.parametrize("text", ['{"model": {}, "model": {}}', '{"model": NaN}', "[" * 100_000, "[]", "", "{", "\xff"])
def test_json_that_is_none(text: str, folder: Path) -> None:
    (folder / "genai_config.json").write_text(text, encoding="latin-1")
    assert "genai_config.json" in opening("onnxruntime-genai", folder)


def test_what_is_opened_is_rebuilt(folder: Path) -> None:
    """Files that are in the folder and not among what the runtime needs are not where it looks."""
    (folder / "evil.so").write_bytes(b"x")
    with RuntimeProcess("onnxruntime-genai", folder, threads=1, context_tokens=64, bounds=replay_of(10)) as runtime:
        here = Path(f"/proc/{runtime.info['pid']}/cwd").resolve()
        inside = {path.name for path in (here / "artifact").iterdir()}
        environment = Path(f"/proc/{runtime.info['pid']}/environ").read_bytes().decode()
    assert inside == {"genai_config.json", "model.onnx", "model.onnx.data", "tokenizer.json", "tokenizer_config.json"}
    assert f"HOME={here / 'home'}" in environment and "PYTHONPATH" not in environment
    assert not here.exists()


def test_modules_where_the_program_is_started_are_not_imported(
    f32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("numpy", "json", "llama_cpp", "ctypes", "edgedistill"):
        (tmp_path / f"{name}.py").write_text("open('ran', 'w').close(); raise SystemExit(1)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f".:{tmp_path}:")
    monkeypatch.setenv("GGML_VK_VISIBLE_DEVICES", "9")
    with RuntimeProcess(
        "llama.cpp", f32, threads=1, context_tokens=64, use_extra_bufts=False, bounds=replay_of(10)
    ) as runtime:
        assert len(runtime.greedy([1], 2)) == 2
        assert b"GGML_VK" not in Path(f"/proc/{runtime.info['pid']}/environ").read_bytes()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("runtime", ["onnxruntime", "onnxruntime-genai"])
def test_nothing_is_left_in_the_home(runtime: str, int4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both keep a database of what they ran, for their maker, unless they are told not to."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    with RuntimeProcess(runtime, int4, threads=1, context_tokens=64) as process:
        assert len(process.greedy([1], 2)) == 2
    assert not listing(tmp_path)


# ONNX


def changed_graph(folder: Path, change: Callable[[onnx.ModelProto], object]) -> None:
    path = folder / "model.onnx"
    model = onnx.load(str(path), load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())


def endless(model: onnx.ModelProto) -> None:
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["d"])], "body",
        [helper.make_tensor_value_info("i", TensorProto.INT64, []), helper.make_tensor_value_info("c", 9, [])],
        [helper.make_tensor_value_info("d", TensorProto.BOOL, [])],
    )  # fmt: skip
    model.graph.initializer.append(helper.make_tensor("go", TensorProto.BOOL, [], [True]))
    model.graph.node.append(helper.make_node("Loop", ["", "go"], [], body=body))


def huge(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer.add(name="huge", data_type=TensorProto.FLOAT, dims=[3_000_000_000])
    tensor.raw_data = b"\0" * 16


def outside(**entries: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.external_data)
        kept = {e.key: e.value for e in tensor.external_data} | entries
        del tensor.external_data[:]
        for key, value in kept.items():
            tensor.external_data.add(key=key, value=value)

    return change


def constant(**settings: Any) -> Callable[[onnx.ModelProto], None]:
    """A node whose attribute is a tensor of this kind."""

    def change(model: onnx.ModelProto) -> None:
        node = helper.make_node("Constant", [], ["c"])
        node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR, t=onnx.TensorProto(**settings))
        model.graph.node.append(node)

    return change


def function(model: onnx.ModelProto) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    model.functions.append(helper.make_function("", "Add", ["x"], ["y"], nodes, model.opset_import))


def node(*arguments: Any, **options: Any) -> Callable[[onnx.ModelProto], None]:
    return lambda model: model.graph.node.append(helper.make_node(*arguments, **options))


GRAPHS: dict[str, tuple[Callable[[onnx.ModelProto], object], str]] = {
    "custom domain": (node("Run", [], ["x"], domain="evil"), "'Run' of the domain 'evil'"),
    "custom opset": (lambda m: m.opset_import.add(domain="ai.onnx.contrib", version=1), "ai.onnx.contrib"),
    "unknown operator": (node("Shell", [], ["x"]), "Shell"),
    "context of a provider": (node("EPContext", [], ["x"], domain="com.microsoft"), "EPContext"),
    "loop": (endless, "Loop"),
    "function": (function, "field 25"),
    "training": (lambda m: m.training_info.add(), "field 20"),
    "random": (node("RandomNormal", [], ["x"], shape=[1]), "RandomNormal"),
    "regular expression": (node("RegexFullMatch", ["x"], ["y"], pattern="(a*)*b"), "RegexFullMatch"),
    "3 billion elements": (huge, "needs 12,000,000,000 bytes"),
    "no bytes": (constant(data_type=1, dims=[1 << 31], float_data=[1.0]), "4 bytes of values"),
    "overflow": (constant(data_type=1, dims=[1 << 32, 1 << 32], raw_data=b""), "elements"),
    "negative": (constant(data_type=1, dims=[-1], raw_data=b""), "shape"),
    "text": (constant(data_type=8, dims=[1], string_data=[b"x"]), "field 6"),
    "another folder": (outside(location="../model.onnx.data"), "not a file beside the model"),
    "a file of the system": (outside(location="/etc/passwd"), "not a file beside the model"),
    "in memory": (outside(location="*/_ORT_MEM_ADDR_/*"), "not a file beside the model"),
    "a folder": (outside(location=".."), "not a file beside the model"),
    "missing": (outside(location="other.data"), "is missing"),
    "behind the end": (outside(offset="99999999999"), "from byte 99,999,999,999"),
    "negative offset": (outside(offset="-8"), "at"),
    "short": (outside(length="1"), "names 1 "),
    "constant outside": (
        constant(data_type=1, dims=[1], data_location=1, external_data=[{"key": "location", "value": "/etc/passwd"}]),
        "not a file beside the model",
    ),
    "settings": (lambda m: m.metadata_props.add(key="ort_config", value="{}"), "settings for onnxruntime"),
    "sparse": (lambda m: m.graph.sparse_initializer.add(), "field 15"),
}


@pytest.mark.parametrize("what", GRAPHS)
def test_graphs_that_are_not_allowed(what: str, folder: Path) -> None:
    change, said = GRAPHS[what]
    changed_graph(folder, change)
    with pytest.raises(UserError) as caught:
        check_onnx(folder / "model.onnx")
    assert said in caught.value.cause
    for runtime in ("onnxruntime-genai", "onnxruntime") if what in ("loop", "custom domain") else ():
        assert said in opening(runtime, folder)


def test_what_a_graph_holds_is_told(folder: Path) -> None:
    found = check_onnx(folder / "model.onnx")
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    assert found.weights == {t.name: (t.data_type, tuple(t.dims)) for t in model.graph.initializer}
    assert set(found.inputs) == {one.name for one in model.graph.input}
    assert found.outputs["logits"][1][-1] == 263 and found.inputs["input_ids"][0] == TensorProto.INT64
    weight = next(t for t in model.graph.initializer if t.external_data)
    place = {e.key: e.value for e in weight.external_data}
    file, offset, size = found.pieces[weight.name][-1]
    assert (file, offset, size) == (place["location"], int(place["offset"]), int(place["length"]))
    assert all(node.name in found.pieces for node in model.graph.node)


def test_where_a_ggufs_bytes_lie_is_told(f32: Path) -> None:
    found, data = check_gguf(f32), f32.read_bytes()
    for tensor in gguf.GGUFReader(f32).tensors:
        begin, size = found.spans[tensor.name]
        assert data[begin : begin + size] == tensor.data.tobytes()
        assert found.kinds[tensor.name] == (int(tensor.tensor_type), tuple(int(n) for n in tensor.shape))


def test_two_graphs_in_one_are_refused(folder: Path) -> None:
    """protobuf merges a message that stands twice: a reader that looks at one of them is deceived."""
    path = folder / "model.onnx"
    other = onnx.ModelProto()
    endless(other)
    path.write_bytes(path.read_bytes() + other.SerializeToString())
    with pytest.raises(UserError, match="field 7 twice"):
        check_onnx(path)


@pytest.mark.parametrize("data", [b"", b"\x3a\xff\xff\xff\xff\x0f", b"\x3b", b"\x00\x00", b"\x0a" * 9, b"\xff" * 11])
def test_what_is_no_graph(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(data)
    with pytest.raises(UserError):
        check_onnx(tmp_path / "model.onnx")


def test_millions_of_fields_take_seconds_at_most(tmp_path: Path) -> None:
    nodes = b"\x0a\x00" * 3_000_000
    head = b"\x3a" + bytes([len(nodes) >> 7 * i & 127 | (128 if i < 3 else 0) for i in range(4)])
    (tmp_path / "model.onnx").write_bytes(head + nodes)
    started = time.process_time()
    with pytest.raises(UserError, match="more fields than are read"):
        check_onnx(tmp_path / "model.onnx")
    assert time.process_time() - started < 5


# GGUF


def header(*pairs: bytes, tensors: bytes = b"", counts: tuple[int, int] | None = None, version: int = 3) -> bytes:
    many = counts if counts is not None else (0, len(pairs))
    return b"GGUF" + struct.pack("<IQQ", version, *many) + b"".join(pairs) + tensors


def string(text: str | bytes) -> bytes:
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def tensor(name: str, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


U64 = struct.Struct("<Q").pack
HEADERS: dict[str, tuple[bytes, str]] = {
    "keys": (header(counts=(0, 1 << 60)), "keys"),
    "tensors": (header(counts=(1 << 60, 0)), "tensors"),
    "string": (header(pair("general.name", 8, U64(1 << 62))), "general.name"),
    "long key": (header(U64(1 << 40)), "a key"),
    "array": (header(pair("a.b", 9, struct.pack("<IQ", 4, 1 << 62))), "values"),
    "array of texts": (header(pair("a.b", 9, struct.pack("<IQ", 8, 1 << 62))), "texts"),
    "texts": (header(pair("a.b", 9, struct.pack("<IQ", 8, 2) + U64(1 << 62))), "a text of"),
    "nested arrays": (header(pair("a.b", 9, struct.pack("<IQIQ", 9, 1, 9, 1))), "array of the type 9"),
    "type": (header(pair("a.b", 99, b"")), "type 99"),
    "nan": (header(pair("a.b", 6, struct.pack("<f", float("nan")))), "nan"),
    "infinite": (header(pair("a.b", 12, struct.pack("<d", float("inf")))), "inf"),
    "nan within": (header(pair("a.b", 9, struct.pack("<IQff", 6, 2, 1.0, float("nan")))), "not finite"),
    "truth": (header(pair("a.b", 7, b"\x02")), "truth"),
    "twice": (header(pair("a.b", 0, b"\1"), pair("a.b", 0, b"\1")), "twice"),
    "key with an escape": (header(pair("a.\x1b[31m", 0, b"\1")), "not among what is allowed"),
    "no utf-8": (header(pair("general.name", 8, string(b"\xff"))), "UTF-8"),
    "layers": (header(pair("llama.block_count", 4, struct.pack("<I", 1 << 31))), "llama.block_count"),
    "negative": (header(pair("llama.vocab_size", 5, struct.pack("<i", -1))), "llama.vocab_size"),
    "token id": (header(pair("tokenizer.ggml.eos_token_id", 4, struct.pack("<I", 7))), "there are 0 tokens"),
    "scores": (header(pair("tokenizer.ggml.scores", 9, struct.pack("<IQf", 6, 1, 0.0))), "1 values for 0 tokens"),
    "alignment": (header(pair("general.alignment", 4, struct.pack("<I", 3))), "general.alignment"),
    "dimensions": (header(tensors=string("t") + struct.pack("<I", 1 << 31), counts=(1, 0)), "dimensions"),
    "shape": (header(tensors=tensor("t", [1 << 62, 4]), counts=(1, 0)), "shape"),
    "no elements": (header(tensors=tensor("t", [0]), counts=(1, 0)), "shape"),
    "tensor type": (header(tensors=tensor("t", [32], kind=77), counts=(1, 0)), "type 77"),
    "block": (header(tensors=tensor("t", [33], kind=2), counts=(1, 0)), "blocks of 32"),
    "overlap": (header(tensors=tensor("t", [8]) + tensor("u", [8], offset=0), counts=(2, 0)), "begins at byte 0"),
    "far away": (header(tensors=tensor("t", [8], offset=1 << 50), counts=(1, 0)), "begins at byte"),
    "same name": (header(tensors=tensor("t", [8]) + tensor("t", [8], offset=32), counts=(2, 0)), "second time"),
    "no data": (header(tensors=tensor("t", [1 << 30]), counts=(1, 0)), "cut short"),
    "longer": (header() + b"\0" * 4096, "longer"),
    "version": (header(version=1), "version"),
}


@pytest.mark.parametrize("what", HEADERS)
def test_ggufs_that_are_not_allowed(what: str, tmp_path: Path) -> None:
    data, said = HEADERS[what]
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(UserError) as caught:
        check_gguf(tmp_path / "x.gguf")
    assert said in caught.value.cause and "\x1b" not in caught.value.cause


def test_every_shorter_gguf_is_refused(f32: Path, tmp_path: Path) -> None:
    whole = f32.read_bytes()
    check_gguf(f32)
    cut = tmp_path / "cut.gguf"
    for size in [*range(0, 4000, 97), len(whole) // 2, len(whole) - 40, len(whole) - 1]:
        cut.write_bytes(whole[:size])
        with pytest.raises(UserError):
            check_gguf(cut)


def test_a_large_vocabulary_is_read_in_a_second(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "llama")
    tokens = 262_144
    writer.add_token_list([f"token {i}" for i in range(tokens)])
    writer.add_token_scores([0.0] * tokens)
    writer.add_token_types([1] * tokens)
    writer.add_token_merges([f"a{i} b{i}" for i in range(2 * tokens)])
    writer.add_eos_token_id(tokens - 1)
    writer.add_tensor("t", np.zeros(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    started = time.process_time()
    found = check_gguf(tmp_path / "big.gguf")
    assert time.process_time() - started < 1.5
    assert found.arrays["tokenizer.ggml.tokens"] == (8, tokens)


def test_parts_that_are_not_each_others(f32: Path, tmp_path: Path) -> None:
    from edgedistill.gguf.split import split_gguf

    copy = tmp_path / "model.gguf"
    shutil.copyfile(f32, copy)
    first, second, *_ = split_gguf(copy, 2_000_000)
    assert sum(len(part.tensors) for part in check_ggufs(first)) == len(check_gguf(f32).tensors)
    with RuntimeProcess(
        "llama.cpp", first, threads=1, context_tokens=64, use_extra_bufts=False, bounds=replay_of(10)
    ) as runtime:
        assert len(runtime.greedy([1], 2)) == 2
    shutil.copyfile(first, second)
    assert "is not number 2" in opening("llama.cpp", first)


# Tokenizers and transformers folders


@pytest.mark.parametrize("text", ["{}", '{"model": {}}', '{"model": {"type": "BPE", "vocab": {}}}',
                                  '{"model": {"type": "BPE", "vocab": {"a": -1}}}', '{"code": 1}', "[1]"])  # fmt: skip
def test_no_tokenizer(text: str, tmp_path: Path, folder: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UserError):
        check_tokenizer_json(tmp_path / "tokenizer.json")
    if text == "{}":
        shutil.copyfile(tmp_path / "tokenizer.json", folder / "tokenizer.json")
        assert "holds no tokenizer" in opening("onnxruntime-genai", folder)


def test_the_tokenizers_configuration_is_rebuilt(folder: Path, checkpoint: Path) -> None:
    check_tokenizer_json(checkpoint / "tokenizer.json")
    path = folder / "tokenizer_config.json"
    edited(path, lambda tree: tree.update(unheard_of="x"))
    assert "unheard_of" not in json.loads(rebuilt_tokenizer_config(path))
    edited(path, lambda tree: tree.update(auto_map={"AutoTokenizer": ["evil.Tokenizer", None]}))
    assert "auto_map" in opening("onnxruntime-genai", folder)


def quantized_folder(place: Path, **changes: Any) -> Path:
    from safetensors.numpy import save_file

    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 8, "hidden_size": 8,
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    }  # fmt: skip
    place.mkdir(exist_ok=True)
    (place / "config.json").write_text(json.dumps(config | changes))
    save_file({"t": np.zeros(4, dtype=np.float32)}, place / "model.safetensors")
    return place


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, "auto_map"),
        ({"_attn_implementation": "kernels-community/evil"}, "_attn_implementation"),
        ({"use_kernels": True}, "use_kernels"),
        ({"model_type": "evil"}, "model_type"),
        ({"architectures": ["Evil"]}, "architectures"),
        ({"quantization_config": {"quant_method": "quanto"}}, "quant_method"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
    ],
)
def test_folders_that_are_not_allowed(changes: Tree, said: str, tmp_path: Path) -> None:
    written, weights = rebuilt_folder(quantized_folder(tmp_path / "honest", note="x"))
    assert weights == ["model.safetensors"] and b"note" not in written["config.json"]
    with pytest.raises(UserError) as caught:
        rebuilt_folder(quantized_folder(tmp_path / "changed", **changes))
    assert said in caught.value.cause


def test_an_honest_folder_runs_within_the_bounds(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from checkpoints import tiny

    from edgedistill.models.bitsandbytes import load_quantized

    sizes = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32, "vocab_size": 512, "num_hidden_layers": 1}
    checkpoint = tiny(tmp_path / "checkpoint", **sizes)
    made = tmp_path / "made"
    load_quantized(checkpoint, "int8", torch.device("cpu")).save_pretrained(made)
    shutil.copyfile(checkpoint / "tokenizer.json", made / "tokenizer.json")
    with RuntimeProcess("transformers", made, threads=1, context_tokens=64, bounds=replay_of(10)) as runtime:
        assert len(runtime.greedy([1, 2], 3)) == 3
        assert runtime.tokenize("the cat")
        assert runtime.info["bounds"]["limits"] == "on"


def test_weights_that_may_be_code_are_not_opened(tmp_path: Path) -> None:
    place = quantized_folder(tmp_path / "x")
    (place / "model.safetensors").rename(place / "pytorch_model.bin")
    assert "may hold code" in opening("transformers", place)


# By the command line, on bundles whose every hash is right


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Command, Path]:
    made = Ingredients(tmp_path_factory.mktemp("ingredients"))
    artifacts = [made.exported("INT4", onnx=True)]
    place = made.make(tmp_path_factory.mktemp("out") / "tiny", artifacts=artifacts)
    return Command(made.folder, warm=True), place


BUNDLES: dict[str, tuple[str, Callable[[Path, str], object], str]] = {
    "library": (
        "genai_config.json",
        lambda path, so: edited(path, lambda c: CODE_PLACES["decoder"](c, so)),
        "custom_ops_library",
    ),
    "profiling": (
        "genai_config.json",
        lambda path, so: edited(
            path, lambda c: c["model"]["decoder"]["session_options"].update(enable_profiling=so + ".profile")
        ),
        "enable_profiling",
    ),
    "loop": ("model.onnx", lambda path, _: changed_graph(path.parent, endless), "Loop"),
    "huge": ("model.onnx", lambda path, _: changed_graph(path.parent, huge), "12,000,000,000 bytes"),
}


def listing(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.mark.parametrize("what", BUNDLES)
def test_bundle_verify_refuses_and_leaves_nothing(
    what: str, bundle: tuple[Command, Path], library: tuple[Path, Path], tmp_path: Path
) -> None:
    command, place = bundle
    so, mark = library
    changed = Path(shutil.copytree(place, tmp_path / place.name))
    name, change, said = BUNDLES[what]
    (path,) = changed.rglob(name)
    change(path, str(so))
    reseal(changed, documents=True)
    before, beside = listing(changed), listing(so.parent)
    refused(command("bundle", "verify", str(changed)), said)
    assert listing(changed) == before and listing(so.parent) == beside and not mark.exists()


def test_the_honest_bundle_passes_within_its_bounds(bundle: tuple[Command, Path]) -> None:
    command, place = bundle
    before = listing(place)
    check = command.json("bundle", "verify", str(place))
    assert check["golden_replayed"] == sum(path.endswith(".prompt.txt") for path in before) > 0
    assert listing(place) == before
