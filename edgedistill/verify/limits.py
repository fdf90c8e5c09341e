"""What two rungs of one model may differ by: KL in nats a token. docs/gate.md has what was measured.

Five times and more what honest artifacts of trained models showed, since models differ; what is finer than that is
found by the check of the files, which compares tensor by tensor.
"""

from __future__ import annotations

from edgedistill.config.recipe import Verify

DEFAULT_MIN_RETENTION = float(Verify.model_fields["min_retention"].default)
# Known corners (a literal ▁, combining marks) touch a few of the check's texts, a wrong tokenizer most.
MAX_MISMATCH_SHARE = 0.25

# Of the stored weights against the student's, by the quantization.
QUANTIZING = {
    "gguf": {
        "F32": 1e-6, "F16": 1e-4, "BF16": 2e-3, "Q8_0": 5e-3, "Q6_K": 0.02, "Q5_K_M": 0.05, "Q5_K_S": 0.05,
        "Q5_1": 0.1, "Q5_0": 0.1, "Q4_K_M": 0.3, "Q4_K_S": 0.3, "Q4_1": 0.5, "Q4_0": 0.5, "IQ4_NL": 0.4, "IQ4_XS": 0.3,
        "Q3_K_L": 0.8, "Q3_K_M": 0.8, "Q3_K_S": 1.0, "IQ3_M": 0.8, "IQ3_S": 0.8, "IQ3_XS": 1.0, "IQ3_XXS": 1.5,
    },
    "onnx": {"FP32": 1e-6, "FP16": 1e-4, "BF16": 2e-3, "INT8": 5e-3, "INT4": 0.8},
    "bitsandbytes": {"INT8": 0.02, "NF4": 0.8},
}  # fmt: skip
# Two bits a weight and less may cost a small model most of what it knows: the retention and the files are what counts.
COARSEST = 3.0

# Of the artifact's runtime against torch with the same stored weights. Floating point: float16 products and KV cache.
# Quantized: activations are rounded too, to 8 bits a block.
RUNTIME = {"F32": 1e-4, "F16": 1e-4, "FP32": 1e-4, "FP16": 1e-3, "BF16": 1e-3}
RUNTIME_QUANTIZED = 0.01


def quantizing_limit(artifact: str) -> float:
    """Of "gguf:Q4_0": KL(student ‖ quantized), nats a token."""
    format_, quantization = artifact.split(":")
    return QUANTIZING.get(format_, {}).get(quantization, COARSEST)


def runtime_limit(artifact: str) -> float:
    """Of "gguf:Q4_0": KL(quantized ‖ shipped), nats a token."""
    return RUNTIME.get(artifact.split(":")[1], RUNTIME_QUANTIZED)
