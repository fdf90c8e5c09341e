"""Formats, their quantizations, and the runtimes that run them: FORMAT:QUANTIZATION is an artifact's name."""

from __future__ import annotations

ARTIFACTS: dict[str, tuple[str, ...]] = {
    "gguf": (
        "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0",
        "IQ4_NL", "IQ4_XS", "Q3_K_L", "Q3_K_M", "Q3_K_S", "IQ3_M", "IQ3_S", "IQ3_XS", "IQ3_XXS", "Q2_K", "Q2_K_S",
        "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S",
    ),
    # INT8 of a decoder is weight-only; of an encoder or vision model it is static QDQ. INT8-DYNAMIC needs no text.
    "onnx": ("FP32", "FP16", "BF16", "INT8", "INT8-DYNAMIC", "INT8-WEIGHTS", "INT4"),
    "bitsandbytes": ("INT8", "NF4"),
    "executorch": ("FP32", "8DA4W"),
}  # fmt: skip
# Which runtime decodes with a format, and which runs an encoder of it; a profile must have it for what it names.
RUNTIMES_OF = {
    "gguf": "llama.cpp",
    "onnx": "onnxruntime-genai",
    "bitsandbytes": "transformers",
    "executorch": "executorch",
}
ENCODER_RUNTIMES_OF = {"gguf": "llama.cpp", "onnx": "onnxruntime"}
