"""Peak memory of training, computed from shapes and settings before anything runs. Everything here is `derived`.

What is predicted is the process's peak less what stands after its imports: at each moment of a run (the teacher's
loading, the building of its cache, the loss, the backward pass's beginning and end, ...) the tensors that live
then are counted, and the largest moment is the peak. The counts follow from the code: `losses/losses.py` for the head,
transformers' Llama, Qwen2 and Qwen3 layers for what autograd keeps of each (held to torch's saved tensors by
tests/fit/test_training_memory.py). Two constants are measured, not derived: RUNTIME_BYTES and FREED_SHARE.

Validated on CPUs (benchmarks/training_memory.py, tests/fit/test_training_memory.py): the same count serves for a GPU,
where no measurement stands behind it. torch.compile is left out, and so is sharding: it is one rank's memory without.

Legend: N tokens of a micro-batch, H width, V vocabulary rows, F feed-forward width, Q and K widths of all query and of
all key heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgedistill.config.recipe import Lora, Training
from edgedistill.fit.chunks import BLOCK_BYTES, CACHE_BATCH_TOKENS, EVALUATION_TOKENS, LOGITS_BYTES, SHARD_BYTES
from edgedistill.fit.training_counts import (
    WEIGHT_BYTES,
    adapted_sizes,
    adapter_parameters,
    chunk_rows,
    forward_bytes,
    kept_bytes,
    matrix_parameters,
    teacher_bytes,
)
from edgedistill.records.shape import Shape

# Measured: code that is paged in at its first use, the threads' and the matrix library's buffers.
RUNTIME_BYTES = 27_000_000
# Measured, on glibc: what a step frees stays in the heap in holes that the next step fills only in part. A share of all
# that a step allocates and frees. CUDA's caching allocator behaves alike.
STEP_HOLES = 0.35
GRADIENT_HOLES = 0.62
# glibc maps blocks of that size and above one by one (DEFAULT_MMAP_THRESHOLD_MAX): they leave no holes.
MAPPED_BYTES = 32 << 20
# Blocks of float32 logits that the loss works on at a time: forward KL and cross-entropy in place, any other mix.
PLAIN_BLOCKS, GENERAL_BLOCKS = 3, 9
# Copies of the fp32 logits while a cache is written: themselves, log p, p, and float64 sums that count twice (sampled).
CACHE_BUFFERS = {"sampled": 5, "topk": 3, "dense": 1.5, "hidden": 0}

Signals = Literal["live", "cached"]


@dataclass(frozen=True)
class Teaching:
    """The teacher beside a student: `precision` of its weights as `Teacher.precision`, resolved; `stored` that of its
    file; `kind` the cache's; `further` the teachers that are mixed with it."""

    shape: Shape
    signals: Signals = "live"
    precision: str = "fp32"
    stored: str = "bf16"
    kind: str = "sampled"
    offloaded: bool = False
    further: tuple[Shape, ...] = ()

    @property
    def shapes(self) -> tuple[Shape, ...]:
        return (self.shape, *self.further)

    @property
    def own(self) -> float:
        """Weights of all teachers."""
        return sum(teacher_bytes(each, self.precision) for each in self.shapes)


@dataclass(frozen=True)
class Prediction:
    """The peak, the moment it is reached at, and what it is made of (bytes)."""

    bytes: int
    moment: str
    components: dict[str, int]
    moments: dict[str, int]

    @property
    def text(self) -> str:
        """ "weights 17.8 MB + optimizer 35.7 MB + … (peak: backward pass begins)"."""
        from edgedistill.fit.artifact import human_bytes

        parts = sorted(self.components.items(), key=lambda part: -part[1])
        return " + ".join(f"{name} {human_bytes(size)}" for name, size in parts) + f" (peak: {self.moment})"


def predict(
    student: Shape, training: Training, teaching: Teaching | None = None, *, lora: Lora | None = None,
    blocks: int = PLAIN_BLOCKS, device: str = "cpu",
) -> Prediction:  # fmt: skip
    """Peak bytes of one process that trains `student`, less what stands after the imports.

    `teaching` is the teacher, None where the loss needs none; `lora` the adapters' settings where the rank is above 0;
    `blocks` the loss's float32 buffers; `device` "cpu" or "cuda": a GPU's own memory then.
    """
    run = _Run(student, training, teaching, lora if lora is not None and lora.rank else None, blocks, device)
    moments = run.moments()
    name = max(moments, key=lambda moment: sum(moments[moment].values()))
    components = {part: int(size) for part, size in moments[name].items() if size >= 1}
    return Prediction(
        bytes=sum(components.values()),
        moment=name,
        components=components,
        moments={moment: int(sum(parts.values())) for moment, parts in moments.items()},
    )


@dataclass(frozen=True)
class _Run:
    shape: Shape
    training: Training
    teaching: Teaching | None
    lora: Lora | None
    blocks: int
    device: str

    @property
    def low(self) -> bool:
        return self.training.precision == "bf16"

    @property
    def sequences(self) -> int:
        return min(self.training.batch_sequences, self.training.micro_batch_sequences or self.training.batch_sequences)

    @property
    def tokens(self) -> int:
        return self.sequences * self.training.context_tokens

    @property
    def accumulates(self) -> bool:
        return self.sequences < self.training.batch_sequences

    @property
    def head(self) -> int:
        """Weights of the output head."""
        return self.shape.vocab_size * self.shape.hidden_size

    @property
    def trained(self) -> int:
        """Parameters that are trained."""
        return self.shape.parameters if self.lora is None else adapter_parameters(self.shape, self.lora)

    def moments(self) -> dict[str, dict[str, float]]:
        stands = self._stands()
        found = {"the student's start": {"weights": 4.0 * self.shape.parameters, "runtime": RUNTIME_BYTES}}
        found |= self._teacher_moments()
        step, workspace = self._activations(), self._workspace()
        accumulated = 4.0 * self.trained if self.accumulates else 0.0
        head_gradient = 4.0 * self.head if self.lora is None else 0.0
        whole: dict[str, dict[str, float]] = {
            "the loss": {
                **step, "bf16 copies of weights": self._copies(), "gradients": accumulated,
                "head's gradient": head_gradient, "head's workspace": workspace,
            },
            "the backward pass begins": {
                **step, "bf16 copies of weights": self._copies(), "gradients": accumulated,
                "head's gradient": head_gradient, "backward pass of a layer": self._backward(),
            },
            "the backward pass ends": {
                "gradients": 4.0 * self.trained, "head's gradient": self._late_head_gradients(),
                "backward pass of a layer": self._backward(),
            },
        }  # fmt: skip
        holes = {"holes in the heap": self._holes()}
        for name, parts in whole.items():
            found[name] = stands | parts | holes
        found["evaluation"] = stands | self._evaluation() | holes
        # whole tensors on the CPU: on a CPU the parameters themselves; of a GPU's, the copies lie in the host's memory
        found["a checkpoint"] = dict(stands)
        return found

    def _holes(self) -> float:
        """What the heap holds beyond the tensors that live: of a step's small ones, and of the gradients it freed."""
        step, gradients = self._churn()
        return STEP_HOLES * step + GRADIENT_HOLES * gradients

    def _churn(self) -> tuple[float, float]:
        """Bytes of the heap that a step allocates and frees: its activations and workspace, and its gradients."""
        shape, n, element = self.shape, self.tokens, 2 if self.low else 4
        inner = 4.0 * element * shape.intermediate_size * n * shape.num_hidden_layers
        # with checkpointing too: what a layer keeps stands in the way of what it frees, layer after layer
        rest = n * self._kept() * shape.num_hidden_layers - inner + 16.0 * n * shape.hidden_size
        if self.lora is not None:
            # beside a layer's output: the frozen layer's, the adapter's, and that times its scale
            outputs = sum(size[1] for size in adapted_sizes(shape, self.lora))
            rest += 3.0 * element * n * outputs * shape.num_hidden_layers
        teachers = self._teacher_at_loss
        rows = chunk_rows(n, shape.vocab_size, teachers=teachers, low=self.low, device=self.device)
        logits = element * rows * shape.vocab_size
        step = (
            _heap(inner, element * n * shape.intermediate_size)
            + _heap(rest, 4 * n * shape.hidden_size)
            + _heap(self._copies(), 2 * shape.hidden_size * shape.intermediate_size)
            + _heap(logits * (1 + teachers), logits)
        )
        matrices = matrix_parameters(shape) if self.lora is None else self.trained
        gradients = _heap(4.0 * matrices, 4 * shape.hidden_size * shape.intermediate_size)
        gradients += _heap(4.0 * (self.trained - matrices), 4 * self.head)
        return step, 0.0 if self.accumulates else gradients

    def _stands(self) -> dict[str, float]:
        """What lives through all of training."""
        base = 4.0 * self.shape.parameters
        if self.lora is not None:
            frozen = WEIGHT_BYTES[self.lora.base]
            # bitsandbytes leaves embedding and head as they are, in bf16
            rest = self.shape.parameters - matrix_parameters(self.shape)
            base = frozen * matrix_parameters(self.shape) + (4.0 if self.lora.base == "fp32" else 2.0) * rest
            base += 4.0 * self.trained
        return {
            "weights": base,
            "optimizer": self._optimizer(),
            "teacher": self._teacher_stands(),
            "runtime": RUNTIME_BYTES,
        }

    def _optimizer(self) -> float:
        matrices = matrix_parameters(self.shape) if self.lora is None else self.trained
        if self.training.optimizer == "muon":
            return 4.0 * matrices + 8.0 * (self.trained - matrices)
        if self.training.optimizer == "adamw8bit":
            # two bytes, and two float32 scales a block of 256; vectors and small tensors keep float32
            return 2.04 * matrices + 2.04 * (self.trained - matrices)
        return 8.0 * self.trained

    def _teacher_stands(self) -> float:
        ask = self.teaching
        if ask is None:
            return 0.0
        if ask.signals == "live":
            # of a vocabulary that was trimmed the head's rows are a copy
            trimmed = [each for each in ask.shapes if each.vocab_size > self.shape.vocab_size]
            rows = sum(self.shape.vocab_size * each.hidden_size for each in trimmed)
            return max(2.0, WEIGHT_BYTES[ask.precision]) * rows + (0.0 if ask.offloaded else ask.own)
        if ask.kind != "hidden":
            return 0.0
        if ask.precision == ask.stored:
            # the head is a part of the mapped file, which stays mapped with it
            return teacher_bytes(ask.shape, ask.precision)
        return max(2.0, WEIGHT_BYTES[ask.precision]) * ask.shape.vocab_size * ask.shape.hidden_size

    def _teacher_moments(self) -> dict[str, dict[str, float]]:
        ask = self.teaching
        if ask is None:
            return {}
        # a file of the precision asked for is mapped, and so is itself the weights; another is read and converted
        file = (
            0.0
            if ask.precision == ask.stored
            else WEIGHT_BYTES[ask.stored] * max(each.parameters for each in ask.shapes)
        )
        before = {"weights": 4.0 * self.shape.parameters, "runtime": float(RUNTIME_BYTES)}
        found = {"the teacher's loading": before | {"teacher": ask.own, "teacher's file": file}}
        if ask.signals == "cached":
            context = self.training.context_tokens
            tokens = max(1, CACHE_BATCH_TOKENS // context) * context
            rows = min(tokens, max(1, LOGITS_BYTES // (4 * ask.shape.vocab_size)))
            states = 4.0 * tokens * ask.shape.hidden_size
            logits = 4.0 * rows * ask.shape.vocab_size * CACHE_BUFFERS[ask.kind]
            batch = 2.0 * tokens * {"hidden": ask.shape.hidden_size, "dense": ask.shape.vocab_size}.get(ask.kind, 0)
            if ask.kind == "dense":
                logits = max(logits + batch - 2.0 * rows * ask.shape.vocab_size, 2 * batch)
            found["the cache's building"] = before | {
                "teacher": ask.own,
                # the heap keeps what the pass freed while the logits, mapped one by one, are worked on
                "teacher's forward pass": forward_bytes(ask.shape, tokens, self._teacher_low),
                "teacher's logits": states + logits,
                "cache's shard": max(0.0, SHARD_BYTES - batch) if batch else 0.0,
            }
        return found

    @property
    def _teacher_low(self) -> bool:
        return self.low or (self.teaching is not None and self.teaching.precision != "fp32")

    def _kept(self) -> float:
        """Bytes a token that autograd keeps of a layer that is not checkpointed."""
        return kept_bytes(
            self.shape,
            context=self.training.context_tokens,
            low=self.low,
            documents=self.training.attention == "documents",
            adapters=self.lora.rank if self.lora else 0,
        )

    def _activations(self) -> dict[str, float]:
        """What autograd keeps of a micro-batch, the final states and their gradient."""
        shape, n = self.shape, self.tokens
        context = self.training.context_tokens
        documents = self.training.attention == "documents"
        tables = 8.0 * shape.head_dim * (n if documents else context)
        rest = n * (4.0 * shape.hidden_size * (1 if self.lora else 2) + 8) + tables
        if self.training.activation_checkpointing:
            kept = n * 4.0 * shape.hidden_size * shape.num_hidden_layers
        else:
            kept = n * self._kept() * shape.num_hidden_layers
        return {"activations": kept + rest, "final states and their gradient": 8.0 * n * shape.hidden_size}

    def _copies(self) -> float:
        """bf16 weights that autocast made and the graph holds; with checkpointing autocast's own, gone by the loss."""
        if not self.low or self.training.activation_checkpointing:
            return 0.0
        return 2.0 * matrix_parameters(self.shape)

    def _backward(self) -> float:
        """Gradients that live while one layer is gone back through; with checkpointing, all that it keeps as well."""
        shape, n, element = self.shape, self.tokens, 2 if self.low else 4
        passing = n * (2.0 * element * shape.intermediate_size + 8.0 * shape.hidden_size)
        if self.training.activation_checkpointing:
            passing += n * self._kept()
            passing += 2.0 * matrix_parameters(shape) / shape.num_hidden_layers if self.low else 0.0
        return passing

    def _late_head_gradients(self) -> float:
        """A tied head's gradient waits for the embedding's, and both for their sum."""
        if self.lora is not None:
            return 0.0
        if self.shape.tie_word_embeddings:
            return 4.0 * self.head * (2 if self.accumulates else 1)
        return 4.0 * self.head * (1 if self.accumulates else 0)

    def _workspace(self) -> float:
        """The head's buffers beside its gradient: one chunk's logits, bf16 heads, the blocks in float32."""
        teacher = self._teacher_at_loss
        rows = chunk_rows(self.tokens, self.shape.vocab_size, teachers=teacher, low=self.low, device=self.device)
        element = 2 if self.low else 4
        logits = rows * self.shape.vocab_size * element * (1 + teacher)
        copies = 2.0 * self.head if self.low else 0.0
        states = 0.0
        if self.teaching is not None:
            if teacher:
                widths = sum(each.hidden_size for each in self.teaching.shapes)
                head = self.shape.vocab_size * widths
                weights = "bf16" if self.teaching.precision in ("bf16", "int8", "nf4") else "fp32"
                copies += element * head if weights != ("bf16" if self.low else "fp32") else 0.0
                states = self.tokens * widths * (2.0 if self.teaching.kind == "hidden" and not self._live else 4.0)
            elif self.teaching.kind == "dense":
                states = 2.0 * self.tokens * self.shape.vocab_size
            else:
                states = self.tokens * 50 * 12.0
        block = 4.0 * rows * self.shape.vocab_size if self.device == "cuda" else min(
            float(BLOCK_BYTES), 4.0 * self.tokens * self.shape.vocab_size
        )  # fmt: skip
        return logits + copies + states + self.blocks * block + element * rows * self.shape.hidden_size

    @property
    def _live(self) -> bool:
        return self.teaching is not None and self.teaching.signals == "live"

    @property
    def _teacher_at_loss(self) -> int:
        """How many teachers' logits are made from their states, chunk by chunk."""
        ask = self.teaching
        return len(ask.shapes) if ask is not None and (ask.signals == "live" or ask.kind == "hidden") else 0

    def _evaluation(self) -> dict[str, float]:
        tokens = min(self.tokens, max(EVALUATION_TOKENS, self.training.context_tokens))
        rows = chunk_rows(tokens, self.shape.vocab_size, teachers=0, low=self.low, device=self.device)
        element = 2 if self.low else 4
        copies = 2.0 * (matrix_parameters(self.shape) + self.head) if self.low else 0.0
        return {
            "evaluation": forward_bytes(self.shape, tokens, self.low)
            + rows * self.shape.vocab_size * element
            + PLAIN_BLOCKS * float(BLOCK_BYTES),
            "bf16 copies of weights": copies,
        }


def _heap(size: float, each: float) -> float:
    """`size` where it consists of blocks of `each` bytes that the heap holds, 0 where they are mapped one by one."""
    return size if each < MAPPED_BYTES else 0.0
