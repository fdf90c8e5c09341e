"""Memory of verification: all rungs of the ladder stand in fp32 at once, beside the artifact's runtime. `derived`.

The largest moment is a group's logits: the teacher's, its log-probabilities, and a rung's logits, log-probabilities
and divergences, each fp32 over all tokens of the group and the whole vocabulary.
"""

from __future__ import annotations

from edgedistill.config.recipe import Verify, group_windows
from edgedistill.records.figures import Figure
from edgedistill.records.shape import Shape

# torch and transformers loaded for inference (measured: 0.55 GB), and the runtime's process with its buffers.
PROCESS_BYTES = 600_000_000
RUNTIME_BYTES = 200_000_000
# Arrays [tokens, vocabulary] in fp32 that live together at the peak (measured, tests/fit/test_verification_memory.py).
LOGITS_ARRAYS = 6
FP32_BYTES = 4


def verification_memory(teacher: Shape, student: Shape, settings: Verify, *, artifact_bytes: int) -> Figure:
    """Bytes that verifying one artifact takes at its peak, the runtime's process included."""
    context = settings.context_tokens
    vocabulary = max(teacher.vocab_size, student.vocab_size)
    group = group_windows(context, vocabulary) * context
    weights = FP32_BYTES * (teacher.parameters + 2 * student.parameters)
    logits = LOGITS_ARRAYS * FP32_BYTES * group * vocabulary
    # one layer's activations at a time: the feed-forward's three and the hidden states
    widest = max((teacher, student), key=lambda shape: shape.intermediate_size)
    activations = FP32_BYTES * group * (3 * widest.intermediate_size + 4 * widest.hidden_size)
    runtime = RUNTIME_BYTES + artifact_bytes + FP32_BYTES * context * student.vocab_size
    total = PROCESS_BYTES + weights + logits + activations + runtime
    return Figure(
        value=total,
        unit="B",
        basis="derived",
        source=f"teacher, student and dequantized artifact in fp32 {_gb(weights)}, logits of {group:,} tokens"
        f" {_gb(logits)}, the runtime {_gb(runtime)}, activations and the process {_gb(activations + PROCESS_BYTES)}",
    )


def _gb(value: float) -> str:
    return f"{value / 1e9:.2g} GB"
