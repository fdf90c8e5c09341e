"""Where the teacher's signals come from; the loss does not know.

`LiveSignals` runs the teacher on every batch, `CachedSignals` reads what a pass over the data left on disk
(`signal_cache`), `MixedSignals` averages several teachers' probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch  # noqa: TID253  this module is imported by training alone
from numpy.typing import NDArray
from torch import Tensor, nn  # noqa: TID253

from edgedistill.errors import UserError
from edgedistill.fit.chunks import CACHE_BATCH_TOKENS
from edgedistill.losses.losses import Head, Teacher, TeacherHead, finish_logits
from edgedistill.losses.model_parts import device_of, final_hidden, head_of
from edgedistill.progress import QUIET, Progress
from edgedistill.signals.cache import Produced, build_cache
from edgedistill.signals.cache_reader import CacheReader, open_cache
from edgedistill.tasks.causal_lm import IGNORED, Packed


class Signals(Protocol):
    """The teacher's signals for a batch."""

    name: str

    def batch(self, rows: NDArray[np.int64], inputs: Tensor, positions: Tensor | None = None) -> Teacher:
        """`rows`: numbers of the packed sequences; `inputs` [S, T] their ids in the student's vocabulary; `positions`
        [S, T] within documents."""
        ...


class LiveSignals:
    """The teacher itself, frozen and in eval, on its own device; its hidden states go to the student's.

    `kept` [V] are the teacher's ids of the student's tokens where the student's vocabulary was trimmed: inputs are
    turned into them, and the head has their rows alone, so that its probabilities are renormalised over them.
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        low_precision: bool,
        device: torch.device | None = None,
        kept: Tensor | None = None,
        name: str = "live",
    ) -> None:
        self.name = name
        self.teacher = teacher.eval().requires_grad_(False)
        self.low_precision = low_precision
        self.device = device or _device_of(teacher)
        self.kept = kept
        self._head: Head | None = None
        # a sharded teacher gathers its weights in its own forward pass, so the body is called as a module
        self.body = teacher if getattr(teacher, "is_body", False) else None

    @torch.no_grad()
    def batch(self, rows: NDArray[np.int64], inputs: Tensor, positions: Tensor | None = None) -> TeacherHead:
        inputs = self.own_ids(inputs)
        hidden = (
            self.body(inputs, positions, self.low_precision)
            if self.body is not None
            else final_hidden(self.teacher, inputs, self.low_precision, positions)
        )
        return TeacherHead(hidden.to(self.device), self.head())

    def own_ids(self, inputs: Tensor) -> Tensor:
        """The student's ids [S, T] as the teacher's."""
        return inputs if self.kept is None else self.kept.to(inputs.device)[inputs]

    @torch.no_grad()
    def layers(
        self, inputs: Tensor, positions: Tensor | None, hidden: Sequence[int], attention: Sequence[int]
    ) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Hidden states [S, T, H_t] and attention maps [S, heads, T, T] of the chosen layers.

        Raises UserError for a layer that the teacher does not have.
        """
        if not hidden and not attention:
            return {}, {}
        inputs = self.own_ids(inputs)
        model: Any = self.teacher if self.body is None else self.teacher.student
        count = int(model.config.num_hidden_layers)
        for what, asked, last in (("hidden_layers", hidden, count), ("attention_layers", attention, count - 1)):
            wrong = [layer for layer in asked if not 0 <= layer <= last]
            if wrong:
                raise UserError(
                    f"distill.cache.{what} names layer {wrong[0]}, and the teacher has {count}", f"name 0 to {last}"
                )
        if attention:
            model.set_attn_implementation("eager")  # the fused kernels do not give their maps
        device = device_of(model)
        extra = {} if positions is None else {"position_ids": positions.to(device)}
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.low_precision):
            out = model.get_decoder()(
                input_ids=inputs.to(device), use_cache=False, output_hidden_states=bool(hidden),
                output_attentions=bool(attention), **extra,
            )  # fmt: skip
        return (
            {layer: out.hidden_states[layer] for layer in hidden},
            {layer: out.attentions[layer] for layer in attention},
        )

    def head(self) -> Head:
        """The teacher's output head on the student's device; rows that the student lacks left out."""
        if self._head is None:
            model: Any = self.teacher if self.body is None else self.teacher.student
            head = head_of(model)
            weight, bias = _plain(head.weight), None if head.bias is None else _plain(head.bias)
            if self.kept is not None:
                weight = weight[self.kept.to(weight.device)]
                bias = None if bias is None else bias[self.kept.to(bias.device)]
            self._head = Head(
                weight.to(self.device),
                bias=None if bias is None else bias.to(self.device),
                scale=head.scale,
                softcap=head.softcap,
            )
        return self._head


class CachedSignals:
    """Signals of all packed sequences, made before training and read from disk."""

    def __init__(self, reader: CacheReader, *, url: str = "", name: str | None = None) -> None:
        self.reader = reader
        self.url = url
        self.name = name or f"cached, {reader.kind}"

    def batch(self, rows: NDArray[np.int64], inputs: Tensor, positions: Tensor | None = None) -> Teacher:
        return self.reader.batch(rows)


class MixedSignals:
    """Several teachers at once: the mean of their probabilities at the loss's temperature, by weight.

    Weights are shares: they are divided by their sum. Raises ValueError where one is not above 0.
    """

    def __init__(self, parts: Sequence[tuple[LiveSignals, float]]) -> None:
        if not parts or min(weight for _, weight in parts) <= 0:
            raise ValueError(f"weights {[weight for _, weight in parts]}: each is above 0")
        total = sum(weight for _, weight in parts)
        self.parts = [(part, weight / total) for part, weight in parts]
        self.name = " + ".join(f"{weight:g}·{part.name}" for part, weight in self.parts)

    def batch(
        self, rows: NDArray[np.int64], inputs: Tensor, positions: Tensor | None = None
    ) -> tuple[tuple[TeacherHead, float], ...]:
        return tuple((part.batch(rows, inputs, positions), weight) for part, weight in self.parts)


def mixed_logits(parts: Sequence[tuple[TeacherHead, float]], *, vocab: int, temperature: float) -> Tensor:
    """Logits [N, V] fp32 whose softmax at `temperature` is the teachers' mean there: T · log Σ share · softmax(z / T).

    They say nothing of the mean at another temperature.
    """
    mixed: Tensor | None = None
    for part, share in parts:
        weight = part.head.weight[:vocab]
        bias = None if part.head.bias is None else part.head.bias[:vocab]
        # as in a cache of one teacher: states count as bf16 keeps them
        states = part.hidden.to(torch.bfloat16).to(weight.dtype)
        logits = finish_logits((states @ weight.T).float(), bias, part.head)
        each = torch.log_softmax(logits / temperature, -1) + math.log(share)
        mixed = each if mixed is None else torch.logaddexp(mixed, each)
    assert mixed is not None
    return temperature * mixed


def produce_from(
    teacher: LiveSignals | MixedSignals,
    data: Packed,
    *,
    documents: bool,
    temperature: float = 1.0,
    hidden_layers: Sequence[int] = (),
    attention_layers: Sequence[int] = (),
) -> Callable[[NDArray[np.int64]], Produced]:
    """What a cache is built from: rows → the teacher's final hidden states, its head, chosen layers, what counts.

    Of several teachers there are no common states: their mixed logits at `temperature` are made instead, a slice of
    the tokens at a time, and no layers can be kept. Layer 0 of `hidden_layers` is the embedding, layer i the output of
    the i-th; `attention_layers` count from 0.
    """

    def produce(rows: NDArray[np.int64]) -> Produced:
        inputs = torch.from_numpy(data.sequence_ids(rows)[:, :-1])
        targets = torch.from_numpy(data.targets(rows, documents=documents))
        positions = torch.from_numpy(data.positions(rows)) if documents else None
        if isinstance(teacher, MixedSignals):
            parts = teacher.batch(rows, inputs, positions)

            def logits(tokens: slice, vocab: int) -> Tensor:
                cut = [(TeacherHead(part.hidden[tokens], part.head), share) for part, share in parts]
                return mixed_logits(cut, vocab=vocab, temperature=temperature)

            first = parts[0][0]
            return Produced(
                hidden=first.hidden.view(len(rows), data.context, -1), head=first.head, layers={}, attentions={},
                counted=targets != IGNORED, logits=logits,
            )  # fmt: skip
        layers, attentions = teacher.layers(inputs, positions, hidden_layers, attention_layers)
        given = teacher.batch(rows, inputs, positions)
        hidden = given.hidden.view(len(rows), data.context, -1)
        return Produced(
            hidden=hidden, head=given.head, layers=layers, attentions=attentions, counted=targets != IGNORED
        )

    return produce


def cache_hidden(
    teacher: nn.Module, data: Packed, *, folder: Path, low_precision: bool, progress: Progress = QUIET
) -> CachedSignals:
    """The teacher's final hidden states of all sequences (bf16), kept in `folder`: exact logits without its body."""
    live = LiveSignals(teacher, low_precision=low_precision)
    key = {"kind": "hidden", "sequences": data.sequences, "context": data.context}
    head = live.head()
    build_cache(
        str(folder), key=key, kind="hidden", vocab=head.weight.shape[0], sequences=data.sequences,
        context=data.context, temperature=1.0, draws=0, top_k=0, seed=0,
        produce=produce_from(live, data, documents=False),
        batch_sequences=max(1, CACHE_BATCH_TOKENS // data.context), progress=progress,
    )  # fmt: skip
    return CachedSignals(open_cache(str(folder), key=key, head=head, device=live.device))


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _plain(tensor: Tensor) -> Tensor:
    full: Any = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach()  # type: ignore[no-any-return]
