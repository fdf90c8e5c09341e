"""Importance matrices: how large the inputs of each weight's columns are on calibration text, by hooks in torch.

llama.cpp's quantizers weight a column's squared error by the mean of its squared input (llama.cpp's `imatrix` tool
measures the same in its own graph; its rules are kept: the layers' matrices, not the embedding and the head; every
window begins with BOS where the tokenizer has one).

Legend: N sequences, B sequences of a batch, T tokens, C columns of a weight (its inputs).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgedistill.errors import UserError
from edgedistill.models.architectures import TensorSpec
from edgedistill.models.loading import LOADING
from edgedistill.progress import QUIET, Progress
from edgedistill.quantization.mixes import quantizable
from edgedistill.quantization.options import ExportOptions
from edgedistill.records.artifact import Calibration
from edgedistill.store import canonical_json

Ids = NDArray[np.int32]
Task = Literal["causal-lm", "embedding"]

METHOD = "mean squared input"
# Fewer tell the columns of a layer apart by chance; llama.cpp's own tool takes windows of 512 tokens.
MIN_TOKENS = 2048
BATCH_TOKENS = 2048
BLOCKS_AT_A_TIME = 64
METADATA = "edgedistill.importance"
IN_LAYERS = "blk."


@dataclass(frozen=True)
class Importance:
    """`mean_squares`: torch module → [C] float32, the mean over tokens of each input squared; over `tokens` tokens.

    `calibration` says which text; None where it is not known.
    """

    mean_squares: dict[str, NDArray[np.float32]]
    tokens: int
    calibration: Calibration | None = None


def compute_importance(
    checkpoint: Path,
    sequences: Sequence[Ids],
    *,
    task: Task = "causal-lm",
    batch_tokens: int = BATCH_TOKENS,
    calibration: Calibration | None = None,
    progress: Progress = QUIET,
) -> Importance:
    """Run the torch model over `sequences` (each [T], lengths may differ) and measure the inputs of its matrices.

    Linear layers and GPT-2's Conv1D, but for the head. At most `batch_tokens` tokens go through at once (one sequence
    at least); shorter sequences of a batch are padded, and padding does not count. Sums are in float64, so that the
    result does not depend on the batches. Raises UserError for no sequences, token ids outside of the embedding, and
    for inputs that are NaN or infinite.
    """
    import torch

    if not len(sequences) or not all(len(sequence) for sequence in sequences):
        raise UserError("no calibration text", "give text with --calibration")
    model = _load(checkpoint, task)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    largest = max(int(sequence.max()) for sequence in sequences)
    if largest >= vocabulary:
        raise UserError(
            f"the calibration text has the token {largest:,}, the embedding {vocabulary:,} rows",
            "use the tokenizer that belongs to the model",
        )
    sums = _Sums()
    done = 0
    with sums.hooked(model), torch.inference_mode():
        for ids_BT, mask_BT in _batches(sequences, batch_tokens):
            sums.mask = torch.from_numpy(mask_BT)
            # The decoder alone: logits would cost more than the rest.
            model.base_model(input_ids=torch.from_numpy(ids_BT), attention_mask=sums.mask.long())
            done += len(ids_BT)
            progress.step("importance matrix", done, len(sequences))
    means = {name: total.numpy() / sums.counts[name] for name, total in sums.totals.items()}
    for name, mean in means.items():
        if not np.isfinite(mean).all():
            raise UserError(
                f"the inputs of {name} are NaN or infinite on the calibration text",
                "the training diverged: use an earlier checkpoint",
            )
    return Importance(
        mean_squares={name: mean.astype(np.float32) for name, mean in sorted(means.items())},
        tokens=sum(len(sequence) for sequence in sequences),
        calibration=calibration,
    )


class _Sums:
    """Sums of squared inputs a module, and how many rows went into each; `mask` [B, T] says which tokens count."""

    def __init__(self) -> None:
        self.totals: dict[str, Any] = {}
        self.counts: dict[str, int] = {}
        self.mask: Any = None

    @contextmanager
    def hooked(self, model: Any) -> Iterator[None]:
        import torch
        from transformers.pytorch_utils import Conv1D

        head = model.get_output_embeddings()
        handles = [
            module.register_forward_pre_hook(self._hook(name))
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Callable[[Any, tuple[Any, ...]], None]:
        import torch

        def add(module: Any, inputs: tuple[Any, ...]) -> None:
            x_RC = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
            # What is no row a token (a pooler's first tokens) counts whole.
            if x_RC.shape[0] == self.mask.numel():
                x_RC = x_RC[self.mask.reshape(-1)]
            total = x_RC.to(torch.float64).square_().sum(0)
            self.totals[name] = self.totals[name] + total if name in self.totals else total
            self.counts[name] = self.counts.get(name, 0) + x_RC.shape[0]

        return add


def _load(checkpoint: Path, task: Task) -> Any:
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    kind: Any = AutoModelForCausalLM if task == "causal-lm" else AutoModel
    return kind.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True, **LOADING).eval()


def _batches(sequences: Sequence[Ids], batch_tokens: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.bool_]]]:
    """(ids [B, T], which are real [B, T]), padded behind."""
    longest = max(len(sequence) for sequence in sequences)
    size = max(1, batch_tokens // longest)
    for start in range(0, len(sequences), size):
        part = sequences[start : start + size]
        width = max(len(sequence) for sequence in part)
        ids_BT = np.zeros((len(part), width), dtype=np.int64)
        mask_BT = np.zeros((len(part), width), dtype=bool)
        for row, sequence in enumerate(part):
            ids_BT[row, : len(sequence)] = sequence
            mask_BT[row, : len(sequence)] = True
        yield ids_BT, mask_BT


def calibration_sequences(
    checkpoint: Path, options: ExportOptions, *, task: Task = "causal-lm"
) -> tuple[list[Ids], Calibration]:
    """The sequences that calibration sees, and their record: blocks in an order drawn with `options.seed`.

    A decoder's are windows of `calibration_tokens` of the blocks one after another, BOS first where there is one; an
    encoder's are documents as it reads them ([CLS] ... [SEP]), cut at that length. Raises UserError for no text, or
    for less than `MIN_TOKENS` tokens of it.
    """
    blocks = options.calibration
    if not blocks:
        raise UserError(
            "an importance matrix needs calibration text, and none was given",
            "give text with --calibration, or choose IQ3_S, Q3_K_M or a larger quantization",
        )
    order = np.random.default_rng(options.seed).permutation(len(blocks))
    length = options.calibration_tokens
    wanted = options.calibration_samples * length
    shuffled = [blocks[index] for index in order]
    sequences = _documents(checkpoint, shuffled, options) if task == "embedding" else _windows(
        checkpoint, shuffled, length=length, wanted=wanted
    )  # fmt: skip
    tokens = sum(len(sequence) for sequence in sequences)
    if tokens < MIN_TOKENS:
        raise UserError(
            f"the calibration text gives {len(sequences)} sequences of at most {length} tokens, {tokens:,}"
            f" tokens in all; an importance matrix needs at least {MIN_TOKENS:,}",
            "give more text with --calibration, or more and shorter sequences with --set export.calibration_samples=N"
            " and --set export.calibration_tokens=N",
        )
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(len(sequence).to_bytes(4, "little") + sequence.astype("<i4").tobytes())
    record = Calibration(
        method=METHOD,
        source=options.calibration_source or "calibration text",
        samples=len(sequences),
        tokens=tokens,
        seed=options.seed,
        order_sha256=digest.hexdigest(),
    )
    return sequences, record


def _windows(checkpoint: Path, blocks: Sequence[Sequence[str]], *, length: int, wanted: int) -> list[Ids]:
    from edgedistill.tasks.causal_lm import TextTokenizer, encode_blocks

    tokenizer = TextTokenizer.load(checkpoint)
    parts: list[Ids] = []
    total = 0
    for start in range(0, len(blocks), BLOCKS_AT_A_TIME):
        encoded = encode_blocks(tokenizer, blocks[start : start + BLOCKS_AT_A_TIME])
        parts += encoded
        total += sum(len(part) for part in encoded)
        if total >= wanted:
            break
    stream = np.concatenate(parts)[:wanted]
    windows = stream[: len(stream) // length * length].reshape(-1, length).copy()
    if tokenizer.bos is not None:
        windows[:, 0] = tokenizer.bos
    return list(windows)


def _documents(checkpoint: Path, blocks: Sequence[Sequence[str]], options: ExportOptions) -> list[Ids]:
    from edgedistill.models.folder import open_tokenizer

    tokenizer = open_tokenizer(checkpoint / "tokenizer.json")
    tokenizer.enable_truncation(options.calibration_tokens)
    texts = [text for block in blocks for text in block][: options.calibration_samples]
    return [np.array(item.ids, dtype=np.int32) for item in tokenizer.encode_batch(texts) if item.ids]


def gguf_importance(importance: Importance, specs: Mapping[str, TensorSpec]) -> dict[str, NDArray[np.float32]]:
    """GGUF tensor name → [C] of every matrix in the layers. Rows may be permuted or transposed on the way, but a
    GGUF's columns are always the torch module's inputs in their order.

    Raises UserError where the matrix is of another model.
    """
    found: dict[str, NDArray[np.float32]] = {}
    for name, spec in specs.items():
        if not spec.gguf_name.startswith(IN_LAYERS) or not quantizable(spec.gguf_name, len(spec.stored_shape)):
            continue
        values = importance.mean_squares.get(name.removesuffix(".weight"))
        columns = spec.stored_shape[-1]
        if values is None or values.shape != (columns,):
            has = "nothing" if values is None else f"{values.size} columns"
            raise UserError(
                f"the importance matrix has {has} for {name}, which has {columns} columns",
                "it is of another model: compute it from this one",
            )
        found[spec.gguf_name] = values
    return found


def write_importance(importance: Importance, path: Path) -> None:
    """As safetensors: a tensor a module, its record in the metadata; the same bytes for the same matrix."""
    from safetensors.numpy import save_file

    record = None if importance.calibration is None else importance.calibration.model_dump(mode="json")
    metadata = {METADATA: canonical_json({"tokens": importance.tokens, "calibration": record})}
    save_file(dict(sorted(importance.mean_squares.items())), path, metadata=metadata)


def read_importance(path: Path) -> Importance:
    """What `write_importance` wrote. UserError for any other file."""
    from safetensors import SafetensorError, safe_open

    remedy = "give a file that edgedistill wrote"
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = (file.metadata() or {}).get(METADATA)
            values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as an importance matrix: {error}", remedy) from error
    if metadata is None:
        raise UserError(f"{path} is not an importance matrix: its metadata lacks {METADATA}", remedy)
    for name, mean in values.items():
        if mean.dtype != np.float32 or mean.ndim != 1 or not np.isfinite(mean).all() or (mean < 0).any():
            raise UserError(f"{path}: {name} is not a row of finite, non-negative float32 values", remedy)
    record = json.loads(metadata)
    calibration = None if record["calibration"] is None else Calibration(**record["calibration"])
    return Importance(values, int(record["tokens"]), calibration)
