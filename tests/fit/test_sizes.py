"""Sizes computed from a shape, held to files that the real llama.cpp wrote."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest

from edgedistill.config.targets import ARTIFACTS
from edgedistill.fit.sizes import (
    artifact_bytes,
    compute_buffer_bytes,
    gguf_tensors,
    k_quant_fallbacks,
    kv_cache_bytes,
    read_bytes_a_token,
)
from edgedistill.quantization.mixes import (
    BASE_TYPES,
    GGML_BLOCKS,
    MIXES_THAT_NEED_IMPORTANCE,
    UNQUANTIZED,
    needs_importance,
    usable_type,
    uses_importance,
)
from edgedistill.records.shape import Shape

WIDE = Shape(
    vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=9,
    num_attention_heads=4, num_key_value_heads=2, head_dim=64, tie_word_embeddings=True,
)  # fmt: skip
UNTIED = WIDE.model_copy(update={"tie_word_embeddings": False, "num_hidden_layers": 16})
NARROW = WIDE.model_copy(update={"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 32})
MIXED = WIDE.model_copy(update={"intermediate_size": 352, "num_hidden_layers": 3})
GROUPED = UNTIED.model_copy(update={"num_attention_heads": 4, "num_key_value_heads": 1, "num_hidden_layers": 17})
SEVENTY = WIDE.model_copy(update={"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 80,
                                  "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32})  # fmt: skip
SHAPES = {"wide": WIDE, "untied": UNTIED, "narrow": NARROW, "mixed": MIXED, "grouped": GROUPED, "seventy": SEVENTY}
MIXES = tuple(name for name in BASE_TYPES if name not in UNQUANTIZED)
DRY_RUN_LINE = re.compile(r"\] +(\S+)\.weight +- \[.*?type = +(\w+), size = .*?(?:\((\w+)\))?$")


def _write_f16(shape: Shape, path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_file_type(1)
    rng = np.random.default_rng(0)
    for tensor in gguf_tensors(shape, "F16"):
        vector = tensor.rows == 1
        size = (tensor.columns,) if vector else (tensor.rows, tensor.columns)
        weights = rng.standard_normal(size, dtype=np.float32)
        writer.add_tensor(f"{tensor.name}.weight", weights if vector else weights.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def f16(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sizes")
    for name, shape in SHAPES.items():
        _write_f16(shape, folder / f"{name}.gguf")
    return {name: folder / f"{name}.gguf" for name in SHAPES}


def _quantize(source: Path, out: Path, mix: str, importance: bool, *, dry_run: bool = False) -> list[str]:
    llama_cpp = pytest.importorskip("llama_cpp")
    gguf = pytest.importorskip("gguf")
    import numpy as np

    names = {t.name: int(t.shape[0]) for t in gguf.GGUFReader(source).tensors if len(t.shape) > 1}
    ones = np.ones(max(names.values()), dtype=np.float32).ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    entry = llama_cpp.llama_model_imatrix_data
    entries = [entry(n.encode(), ones, width) for n, width in names.items() if n.startswith("blk.")]
    matrix = (entry * (len(entries) + 1))(*entries)
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{mix}")
    parameters.nthread = 2
    parameters.dry_run = dry_run
    if importance:
        parameters.imatrix = matrix
    lines: list[bytes] = []
    take = llama_cpp.llama_log_callback(lambda level, text, data: lines.append(text))
    llama_cpp.llama_log_set(take, ctypes.c_void_p(0))
    try:
        status = llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(parameters))
    finally:
        llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
    assert status == 0, b"".join(lines[-5:])
    return b"".join(lines).decode().splitlines()


@pytest.mark.parametrize("name", list(SHAPES))
def test_tensor_types_are_those_llama_cpp_chooses(name: str, f16: dict[str, Path], tmp_path: Path) -> None:
    """Every mix, with and without an importance matrix, against what this llama.cpp says that it would write."""
    matrices = {t.name for t in gguf_tensors(SHAPES[name], "F16") if t.type == "F16"}
    for mix in MIXES:
        for importance in (True, False):
            lines = _quantize(f16[name], tmp_path / "none.gguf", mix, importance, dry_run=True)
            found = [match for line in lines if (match := DRY_RUN_LINE.search(line))]
            chosen = {match[1]: (match[3] or match[2]).upper() for match in found if match[1] in matrices}
            computed = {t.name: t for t in gguf_tensors(SHAPES[name], mix, importance=importance)}
            assert chosen == {tensor: computed[tensor].type for tensor in matrices}, (mix, importance)
            needy = any(needs_importance(mix, t.type, f"{n}.weight") for n, t in computed.items() if n in matrices)
            assert importance or needy == any("will require an imatrix" in line for line in lines), mix
            if name == "wide" and not importance:
                assert needy == (mix in MIXES_THAT_NEED_IMPORTANCE), mix


@pytest.mark.parametrize(
    ("name", "quantization", "importance"),
    [
        *((name, mix, False) for name in ("wide", "mixed") for mix in ("Q8_0", "Q5_K_M", "Q4_K_M", "Q4_K_S")),
        ("untied", "Q4_0", True),
        ("untied", "IQ4_XS", False),
        ("narrow", "Q3_K_M", False),
        ("narrow", "IQ3_S", True),
        ("seventy", "IQ2_M", True),
    ],
)
def test_tensors_of_a_real_file_are_of_the_computed_bytes(
    name: str, quantization: str, importance: bool, f16: dict[str, Path], tmp_path: Path
) -> None:
    gguf = pytest.importorskip("gguf")
    out = tmp_path / "out.gguf"
    _quantize(f16[name], out, quantization, importance)
    reader = gguf.GGUFReader(out)
    written = {t.name.removesuffix(".weight"): (t.tensor_type.name, int(t.n_bytes)) for t in reader.tensors}
    computed = {t.name: (t.type, t.bytes) for t in gguf_tensors(SHAPES[name], quantization, importance=importance)}
    assert computed == written
    if importance == uses_importance(quantization):
        # The tokenizer, which this file lacks, is estimated: what remains must be within 2 %.
        without_tokenizer = artifact_bytes(SHAPES[name], "gguf", quantization) - SHAPES[name].vocab_size * 40
        assert without_tokenizer == pytest.approx(out.stat().st_size, rel=0.02)


try:
    import llama_cpp as _llama_cpp

    @_llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def _silent(level: int, text: bytes, data: object) -> None:
        """Keep llama.cpp's chatter out of the test log."""
except ImportError:
    pass


def test_every_mix_offered_is_known() -> None:
    assert set(BASE_TYPES) == set(ARTIFACTS["gguf"])
    assert set(BASE_TYPES.values()) <= set(GGML_BLOCKS)


def test_blocks_are_ggmls() -> None:
    gguf = pytest.importorskip("gguf")
    for name, block in GGML_BLOCKS.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == block


@pytest.mark.parametrize("shape", SHAPES.values())
@pytest.mark.parametrize("quantization", UNQUANTIZED)
def test_every_parameter_is_counted_once(shape: Shape, quantization: str) -> None:
    assert sum(t.rows * t.columns for t in gguf_tensors(shape, quantization)) == shape.parameters


@pytest.mark.parametrize("shape", [s.model_copy(update=u) for s in (WIDE, UNTIED) for u in (
    {"family": "qwen2", "attention_bias": True}, {"family": "qwen3", "qk_norm": True})])  # fmt: skip
def test_biases_and_norms_are_counted(shape: Shape) -> None:
    assert sum(t.rows * t.columns for t in gguf_tensors(shape, "F16")) == shape.parameters


def test_fallbacks() -> None:
    assert k_quant_fallbacks(WIDE, "Q4_K_M") == 0
    assert k_quant_fallbacks(MIXED, "Q4_K_M") == 3  # ffn_down of three layers: rows of 352
    assert k_quant_fallbacks(NARROW, "Q4_0") == 0
    assert usable_type("Q4_K", 288) == "Q5_0"
    assert usable_type("Q6_K", 288) == "Q8_0"
    assert usable_type("Q4_0", 172) == "F16"
    assert usable_type("Q4_K", 172) == "F16"
    assert usable_type("IQ2_XS", 288) == "IQ4_NL"
    assert k_quant_fallbacks(MIXED, "IQ4_XS") == 3


def test_kv_cache_by_hand() -> None:
    # keys and values x 9 layers x 2 heads x 64 x 100 tokens x 2 bytes
    assert kv_cache_bytes(WIDE, 100, "gguf", "Q4_0") == 2 * 9 * 2 * 64 * 100 * 2
    assert kv_cache_bytes(WIDE, 100, "onnx", "INT4") == 2 * 9 * 2 * 64 * 100 * 4


def test_onnx_int4_against_a_file_of_the_builder() -> None:
    """onnxruntime-genai 0.18 wrote 13,395,968 bytes of weights and 318,246 beside for this shape, tied."""
    shape = Shape(vocab_size=4096, hidden_size=512, intermediate_size=1536, num_hidden_layers=6,
                  num_attention_heads=8, num_key_value_heads=4, head_dim=64, max_position_embeddings=1024)  # fmt: skip
    assert artifact_bytes(shape, "onnx", "INT4") == pytest.approx(13_395_968 + 318_246, rel=0.01)


def test_an_untied_embedding_is_not_read_whole() -> None:
    tied = UNTIED.model_copy(update={"tie_word_embeddings": True})
    assert read_bytes_a_token(UNTIED, "gguf", "Q8_0") == read_bytes_a_token(tied, "gguf", "Q8_0")
    assert artifact_bytes(UNTIED, "gguf", "Q8_0") > artifact_bytes(tied, "gguf", "Q8_0")
    assert read_bytes_a_token(UNTIED, "onnx", "INT4") == read_bytes_a_token(tied, "onnx", "INT4")


def test_fewer_bits_are_fewer_bytes() -> None:
    for format_, quantizations in {"gguf": ["F32", "F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "Q4_0"],
                                   "onnx": ["FP32", "INT8", "INT4"]}.items():  # fmt: skip
        sizes = [read_bytes_a_token(WIDE, format_, q) for q in quantizations]
        assert sizes == sorted(sizes, reverse=True)


def test_scratch_grows_with_what_it_holds() -> None:
    assert compute_buffer_bytes(WIDE, 512) == compute_buffer_bytes(WIDE, 4096) > compute_buffer_bytes(WIDE, 64)
