"""How much is worked on at a time: what the losses and the cache take, and what the memory plan counts with."""

from __future__ import annotations

# Of logits and what goes with them, in the head's loss.
CPU_CHUNK_BYTES = 256 << 20
CUDA_CHUNK_BYTES = 1 << 30
CUDA_CHUNK_TOKENS = 1024  # fewer starve the matrix units
FEWEST_CHUNK_TOKENS = 256
BLOCK_BYTES = 2 << 20  # of fp32 logits that are worked on at a time on a CPU: they stay in its caches
# While the teacher's signals are written.
CACHE_BATCH_TOKENS = 4096
SHARD_BYTES = 64 << 20  # about; a shard is whole sequences
LOGITS_BYTES = 128 << 20  # of fp32 logits made at a time
# While a student is evaluated.
EVALUATION_TOKENS = 4096
