"""What a GGUF's types cost, layer by layer, and the mix that keeps what `export.mixed_retention` asks for.

Groups are a layer's attention, its feed-forward, the embedding and the head. A mix is measured in torch with the very
values that the file will hold (the converter's rounding, libggml's quantization, the same importance matrix), on
calibration text, against the checkpoint in float32.

Legend: N scored tokens, V vocabulary, H hidden width, D documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgedistill.errors import UserError
from edgedistill.gguf import ggml
from edgedistill.gguf.importance import MIN_TOKENS, calibration_sequences, gguf_importance
from edgedistill.gguf.request import Request, planned_types
from edgedistill.gguf.stored import as_converted, as_in_torch, packed
from edgedistill.models.architectures import Model, TensorSpec
from edgedistill.progress import QUIET, Progress
from edgedistill.quantization.mixes import EMBEDDING, GGML_BLOCKS, HEAD, LAYER, UNQUANTIZED, quantizable, usable_type
from edgedistill.quantization.options import ExportOptions
from edgedistill.quantization.sensitivity import Group, Measured, Mix, Steps, find_mix, say_result
from edgedistill.records.artifact import Sensitivity
from edgedistill.statistics import by_unit, positive_mean

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgedistill.tasks.causal_lm import Window

Floats = NDArray[np.float32]

# What a matrix may be raised to, by the block of the type that it has: the types that runtimes have fast code for.
HIGHER = {256: ("Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0"), 32: ("Q5_0", "Q8_0")}
# Log-probabilities of the float model are kept up to here; beyond it computes them again for every mix.
REFERENCE_BYTES = 1 << 30
METRICS = {"causal-lm": "mean KL from the float model, nats", "embedding": "1 - cosine to the float model's vectors"}
NOTHING_TO_CHOOSE = "export.mixed_retention did nothing: {} is not quantized"
SMALLER = "lower export.mixed_retention, or choose a larger quantization"


def refuse_mixed(options: ExportOptions, quantization: str) -> None:
    """UserError where `export.mixed_retention` is asked for and cannot be: before any work."""
    if options.mixed_retention is None or quantization in UNQUANTIZED:
        return
    if options.converter is not None:
        raise UserError(
            "export.mixed_retention is set, and --converter writes tensors whose torch names are not known",
            "name types with export.tensor_types, or leave out --converter",
        )
    if not options.calibration:
        raise UserError(
            "export.mixed_retention needs text to measure the layers on, and none was given",
            "give text with --calibration",
        )


def choose_mix(
    request: Request,
    checkpoint: Path,
    model: Model,
    options: ExportOptions,
    *,
    threads: int = 1,
    progress: Progress = QUIET,
) -> tuple[Request, Sensitivity | None]:
    """The request with the types of the smallest mix that keeps `options.mixed_retention`, and the table it came from.

    The request as it is where none is asked for; a file in floating point says in a note that it has no mix. Types
    that the user named stay. Raises UserError for too little text, and where no mix keeps enough.
    """
    if options.mixed_retention is None:
        return request, None
    if request.quantization in UNQUANTIZED:
        return replace(request, notes=[*request.notes, NOTHING_TO_CHOOSE.format(request.quantization)]), None
    text = read_text(checkpoint, model, options, weighted=request.importance is not None)
    stored = StoredModel(checkpoint, model, request, threads=threads)
    ladders = ladders_of(model, request, stored)
    scored = Scored(stored, text)

    def measure(steps: Steps) -> Measured:
        return scored.measure({name: type_ for group, step in steps.items() for name, type_ in ladders[group][1][step]})

    progress.say(
        f"sensitivity: {len(ladders)} groups, each quantized alone, on {text.tokens:,} tokens of the {text.source}"
    )
    mix: Mix = find_mix(
        [group for group, _ in ladders.values()], measure, target=options.mixed_retention,
        metric=METRICS[model.family.task], source=text.source, examples=text.tokens, documents=text.documents,
        remedy=SMALLER, progress=progress,
    )  # fmt: skip
    say_result(mix.record, progress)
    as_it_is = {name: type_ for _, steps in ladders.values() for name, type_ in steps[0]}
    raised = {
        name: type_
        for group, step in mix.steps.items()
        for name, type_ in ladders[group][1][step]
        if type_ != as_it_is[name]
    }
    if not raised:
        return request, mix.record
    overrides = request.overrides | raised
    weighted = request.importance is not None
    types = planned_types(model, request.quantization, overrides, importance=weighted)
    return replace(request, overrides=overrides, types=types), mix.record


def group_of(name: str) -> str:
    """The group of a matrix, from its GGUF name."""
    found = LAYER.match(name)
    if found is None:
        return {EMBEDDING: "embedding", HEAD: "head"}.get(name, name.removesuffix(".weight"))
    part = "attention" if name[found.end() :].startswith("attn") else "feed-forward"
    return f"layer {found[1]} {part}"


def ladders_of(
    model: Model, request: Request, stored: StoredModel
) -> dict[str, tuple[Group, list[list[tuple[str, str]]]]]:
    """Group → itself, and for each of its steps the type of every matrix in it.

    The first step is what the file would hold without a search. A higher one raises those matrices of the group that
    are below it, but for those whose type the user named; steps that cost bytes and round no finer are left out.
    """
    weighted = request.importance is not None
    planned = planned_types(model, request.quantization, request.overrides, importance=weighted)
    members: dict[str, list[str]] = {}
    for name in stored.names:
        members.setdefault(group_of(name), []).append(name)
    found = {}
    for group, names in members.items():
        steps = [[(name, usable_type(planned[name], stored.columns[name])) for name in names]]
        block = max(GGML_BLOCKS[type_][0] for _, type_ in steps[0])
        for type_ in HIGHER.get(block, ()):
            higher = [
                (name, now if name in request.overrides else _raised(now, usable_type(type_, stored.columns[name])))
                for name, now in steps[0]
            ]
            if stored.bytes(higher) > stored.bytes(steps[-1]) and stored.error(higher) < stored.error(steps[-1]):
                steps.append(higher)
        ladder = Group(
            name=group,
            types=tuple(_in_words(step, stored) for step in steps),
            bytes=tuple(stored.bytes(step) for step in steps),
            errors=tuple(stored.error(step) for step in steps),
            float_bytes=sum(2 * stored.size(name) for name in names),
        )
        found[group] = (ladder, steps)
    return found


def _raised(now: str, type_: str) -> str:
    return type_ if _bits(type_) > _bits(now) else now


def _bits(type_: str) -> float:
    weights, size = GGML_BLOCKS[type_]
    return 8 * size / weights


def _in_words(step: Sequence[tuple[str, str]], stored: StoredModel) -> str:
    """ "Q4_K", or "Q4_K, Q6_K" with the type of most weights first."""
    weights: dict[str, int] = {}
    for name, type_ in step:
        weights[type_] = weights.get(type_, 0) + stored.size(name)
    return ", ".join(sorted(weights, key=lambda type_: (-weights[type_], type_)))


class StoredModel:
    """The checkpoint in torch, any of its matrices replaced by what a file stores of it at a type.

    Quantized bytes are kept once made (less than the model in float32 for a whole ladder), values are not.
    """

    def __init__(self, checkpoint: Path, model: Model, request: Request, *, threads: int = 1) -> None:
        from edgedistill.models.device import training_device
        from edgedistill.runtimes.runners import load_torch

        self.threads = threads
        self.device = training_device()
        self.task = model.family.task
        self.model: Any = load_torch(checkpoint, encoder=self.task == "embedding").to(self.device)
        parameters = dict(self.model.named_parameters())
        self.specs: dict[str, TensorSpec] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        for name, spec in model.specs.items():
            if not spec.vector and quantizable(spec.gguf_name, len(spec.stored_shape)):
                self.specs[spec.gguf_name] = spec
                self.parameters[spec.gguf_name] = parameters[name]
        self.masters = {name: parameter.data for name, parameter in self.parameters.items()}
        self.importance = {} if request.importance is None else gguf_importance(request.importance, model.specs)
        self._bytes: dict[tuple[str, str], NDArray[np.uint8]] = {}
        self._errors: dict[tuple[str, str], float] = {}

    @property
    def names(self) -> list[str]:
        """GGUF names of the matrices, in the file's order."""
        return list(self.specs)

    @property
    def columns(self) -> dict[str, int]:
        return {name: spec.stored_shape[-1] for name, spec in self.specs.items()}

    def size(self, name: str) -> int:
        """Weights of a matrix."""
        return self.masters[name].numel()

    def bytes(self, step: Sequence[tuple[str, str]]) -> int:
        """Of the matrices at these types."""
        return sum(self.size(name) * GGML_BLOCKS[type_][1] // GGML_BLOCKS[type_][0] for name, type_ in step)

    def error(self, step: Sequence[tuple[str, str]]) -> float:
        """Sum over the matrices of the squared error of what they give: of the outputs with an importance matrix, of
        the weights, as a share of each matrix's own square, without.
        """
        return sum(self._error(name, type_) for name, type_ in step)

    def values(self, name: str, type_: str) -> Floats:
        """What a file stores of a matrix, in torch's layout (rows in torch's order)."""
        change = self.specs[name].change
        if (name, type_) not in self._bytes:
            self._bytes[name, type_] = packed(
                self._converted(name), type_, self.importance.get(name), tensor=name, threads=self.threads
            )
        return as_in_torch(
            ggml.dequantize(self._bytes[name, type_], type_, self.specs[name].stored_shape), change
        )  # fmt: skip

    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Let the model compute with these, and with the checkpoint's own where none is given."""
        for name, parameter in self.parameters.items():
            parameter.data = weights.get(name, self.masters[name])

    @contextmanager
    def holding(self, types: Mapping[str, str]) -> Iterator[dict[str, Tensor]]:
        """The model with these matrices as stored; what it holds, for `put`."""
        import torch

        weights = {name: torch.from_numpy(self.values(name, type_)).to(self.device) for name, type_ in types.items()}
        try:
            self.put(weights)
            yield weights
        finally:
            self.put({})

    def _converted(self, name: str) -> Floats:
        master = np.ascontiguousarray(self.masters[name].detach().cpu().numpy())
        return as_converted(master, self.specs[name].change)

    def _error(self, name: str, type_: str) -> float:
        if (name, type_) not in self._errors:
            original = self._converted(name)
            squares = np.square(as_converted(self.values(name, type_), self.specs[name].change) - original)
            weights = self.importance.get(name)
            if weights is not None:
                error = float(squares.sum(axis=0, dtype=np.float64) @ weights.astype(np.float64))
            else:
                scale = float(np.square(original, dtype=np.float64).sum())
                error = float(squares.sum(dtype=np.float64)) / scale if scale else 0.0
            self._errors[name, type_] = error
        return self._errors[name, type_]


@dataclass(frozen=True)
class Text:
    """What mixes are measured on: batches of windows; `source` names the text in records."""

    batches: list[list[Window]]
    tokens: int
    documents: int
    source: str


def read_text(checkpoint: Path, model: Model, options: ExportOptions, *, weighted: bool) -> Text:
    """At most `calibration_samples` times `calibration_tokens` tokens of the calibration text.

    Blocks are taken from the end of the order that an importance matrix (`weighted`: there is one) takes from its
    beginning, so that the two share text only where there is little of it; `source` says so then. Raises UserError for
    fewer than two documents or `MIN_TOKENS` tokens.
    """
    from edgedistill.tasks.causal_lm import Window, scoring_windows
    from edgedistill.tasks.causal_lm import groups as of_one_length

    blocks = options.calibration or ()
    order = np.random.default_rng(options.seed).permutation(len(blocks))
    wanted = options.calibration_samples * options.calibration_tokens
    context = min(options.calibration_tokens, model.context_length)
    if model.family.task == "embedding":
        # Every token's vector counts, and there is no next token.
        sequences, _ = calibration_sequences(checkpoint, options, task="embedding")
        windows = [Window(document=i, ids=ids[:context], first=-1) for i, ids in enumerate(sequences)]
        shared = weighted
    else:
        encoded = _encoded(checkpoint, [blocks[i] for i in reversed(order)], wanted)
        windows = scoring_windows(encoded, context=context, stride=None, max_tokens=wanted)
        ahead = _encoded(checkpoint, [blocks[i] for i in order], wanted) if weighted else []
        shared = len(encoded) + len(ahead) > len(blocks)
    documents = len({window.document for window in windows})
    tokens = sum(window.scored for window in windows)
    if documents < 2 or tokens < MIN_TOKENS:
        raise UserError(
            f"the calibration text gives {tokens:,} tokens of {documents} documents to measure layers on;"
            f" export.mixed_retention needs {MIN_TOKENS:,} of two",
            "give more text with --calibration, or more sequences with --set export.calibration_samples=N",
        )
    source = options.calibration_source or "calibration text"
    return Text(
        batches=(
            list(of_one_length(windows, 0))
            if model.family.task == "embedding"
            else _of_any_length(windows, model.sizes.vocab_size)
        ),
        tokens=tokens,
        documents=documents,
        source=f"{source} (of which the importance matrix saw some)" if shared else source,
    )


def _of_any_length(windows: Sequence[Window], vocabulary: int) -> list[list[Window]]:
    """Batches of windows that are nearly as long: a decoder does not look ahead, so padding behind changes nothing."""
    from edgedistill.config.recipe import group_windows

    batches: list[list[Window]] = []
    for window in sorted(windows, key=lambda window: -len(window.ids)):
        if not batches or len(batches[-1]) >= group_windows(len(batches[-1][0].ids), vocabulary):
            batches.append([])
        batches[-1].append(window)
    return batches


def _encoded(checkpoint: Path, blocks: Sequence[Sequence[str]], wanted: int) -> list[NDArray[np.int32]]:
    """Ids of the blocks, in their order, until there are `wanted`."""
    from edgedistill.tasks.causal_lm import TextTokenizer, encode_blocks

    tokenizer = TextTokenizer.load(checkpoint)
    found: list[NDArray[np.int32]] = []
    total = 0
    for block in blocks:
        (ids,) = encode_blocks(tokenizer, [block])
        found.append(ids)
        total += len(ids)
        if total >= wanted:
            break
    return found


class Scored:
    """Mixes of one model on one text.

    Retention of a language model is the smaller of perplexity's ratio (float ÷ mix) and exp(-mean KL): a perplexity
    that a mix's errors happen to improve is no licence. Of an encoder it is the mean cosine of its token vectors.
    """

    def __init__(self, stored: StoredModel, text: Text) -> None:
        self.stored = stored
        self.text = text
        documents = sorted({window.document for batch in text.batches for window in batch})
        self.owner = np.concatenate(
            [
                np.full(window.scored, documents.index(window.document), dtype=np.int64)
                for batch in text.batches
                for window in batch
            ]
        )
        self._references: dict[int, Tensor] = {}
        self._reference_bytes = 0

    def measure(self, types: Mapping[str, str]) -> Measured:
        """`types`: GGUF name → type of the matrices that are quantized; the others are the checkpoint's."""
        import torch

        parts = []
        with torch.no_grad(), self.stored.holding(types) as weights:
            for number, batch in enumerate(self.text.batches):
                parts.append(self._score(number, batch, weights))
        cost = positive_mean(by_unit(np.concatenate([costs for costs, _ in parts]), self.owner))
        if self.stored.task == "embedding":
            return Measured(cost, 1.0 - cost.value)
        rise = float(np.concatenate([rises for _, rises in parts]).mean(dtype=np.float64))
        return Measured(cost, float(np.exp(-max(rise, cost.value))))

    def _score(
        self, number: int, batch: Sequence[Window], weights: Mapping[str, Tensor]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Of a batch's N tokens: what each costs, and for a language model its rise in negative log-likelihood."""
        import torch

        from edgedistill.tasks.metrics import TokenScores

        longest = max(len(window.ids) for window in batch)
        padded = [np.pad(window.ids.astype(np.int64), (0, longest - len(window.ids))) for window in batch]
        ids = torch.from_numpy(np.stack(padded))
        if self.stored.task == "embedding":
            reference_NH, own_NH = self._reference(number, ids, weights), self._vectors(ids)
            return (1.0 - torch.cosine_similarity(reference_NH, own_NH, dim=-1)).clamp_min(0).numpy(), np.zeros(
                0, np.float32
            )
        place = np.arange(longest - 1)
        scored = [(place >= window.first) & (place < len(window.ids) - 1) for window in batch]
        keep = torch.from_numpy(np.concatenate(scored))
        targets = ids[:, 1:].reshape(-1)[keep]
        log_p_NV = self._reference(number, ids, weights)[keep]
        scores = TokenScores()
        scores.add(self._logits(ids)[keep], log_p_NV, targets)
        return scores.kl[0], scores.nll[0] + log_p_NV.gather(1, targets[:, None])[:, 0].numpy()

    def _reference(self, number: int, ids: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """What the float model gives for a batch: log-probabilities of every position but the last, or vectors."""
        if number in self._references:
            return self._references[number]
        self.stored.put({})
        found = self._vectors(ids) if self.stored.task == "embedding" else self._logits(ids).log_softmax(-1)
        self.stored.put(weights)
        size = found.numel() * found.element_size()
        if self._reference_bytes + size <= REFERENCE_BYTES:
            self._reference_bytes += size
            self._references[number] = found
        return found

    def _logits(self, ids: Tensor) -> Tensor:
        logits = self.stored.model(input_ids=ids.to(self.stored.device), use_cache=False).logits
        return logits[:, :-1].flatten(0, 1).float().cpu()  # type: ignore[no-any-return]

    def _vectors(self, ids: Tensor) -> Tensor:
        states = self.stored.model(input_ids=ids.to(self.stored.device)).last_hidden_state
        return states.flatten(0, 1).float().cpu()  # type: ignore[no-any-return]
