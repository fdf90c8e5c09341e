"""Sizes computed from a shape, held to files that the real llama.cpp wrote."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from edgedistill.records import Shape
from edgedistill.sizes import (
    GGML_BLOCKS,
    UNQUANTIZED,
    artifact_bytes,
    compute_buffer_bytes,
    gguf_tensors,
    k_quant_fallbacks,
    kv_cache_bytes,
    read_bytes_a_token,
    usable_type,
)

WIDE = Shape(
    vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=9,
    num_attention_heads=4, num_key_value_heads=2, head_dim=64, tie_word_embeddings=True,
)  # fmt: skip
UNTIED = WIDE.model_copy(update={"tie_word_embeddings": False, "num_hidden_layers": 16})
NARROW = WIDE.model_copy(update={"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 32})
MIXED = WIDE.model_copy(update={"intermediate_size": 352, "num_hidden_layers": 3})
SHAPES = {"wide": WIDE, "untied": UNTIED, "narrow": NARROW, "mixed": MIXED}


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


@pytest.mark.parametrize("quantization", ["Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_0"])
@pytest.mark.parametrize("name", list(SHAPES))
def test_tensor_types_are_those_llama_cpp_chooses(
    name: str, quantization: str, f16: dict[str, Path], tmp_path: Path
) -> None:
    gguf = pytest.importorskip("gguf")
    llama_cpp = pytest.importorskip("llama_cpp")
    out = tmp_path / "out.gguf"
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{quantization}")
    parameters.nthread = 2
    llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
    status = llama_cpp.llama_model_quantize(str(f16[name]).encode(), str(out).encode(), ctypes.byref(parameters))
    assert status == 0
    reader = gguf.GGUFReader(out)
    written = {t.name.removesuffix(".weight"): (t.tensor_type.name, int(t.n_bytes)) for t in reader.tensors}
    computed = {t.name: (t.type, t.bytes) for t in gguf_tensors(SHAPES[name], quantization)}
    assert computed == written
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
