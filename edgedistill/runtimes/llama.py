"""llama.cpp, in the child process: decoding, embeddings, its tokenizer, and `llama_model_quantize`.

The low-level API of llama-cpp-python, because its `Llama` class cannot set `use_extra_bufts` (see probe.py).
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgedistill.errors import UserError, did_you_mean
from edgedistill.runtimes.backend import greedy_timed

MAGIC = b"GGUF"
MAX_BATCH_TOKENS = 512
NO_VOCABULARY = 0  # LLAMA_VOCAB_TYPE_NONE
LOG_ERROR = 4  # GGML_LOG_LEVEL_ERROR
LOG_CONTINUED = 5  # GGML_LOG_LEVEL_CONT
GGML_TYPE_NAMES = {0: "f32", 1: "f16", 8: "q8_0", 30: "bf16"}
FLASH_ATTENTION_NAMES = {-1: "auto", 0: "off", 1: "on"}


def quantization_types() -> dict[str, int]:
    """Names that `llama_model_quantize` takes → its numbers, as this build of llama.cpp has them."""
    import llama_cpp

    prefixes = ("LLAMA_FTYPE_MOSTLY_", "LLAMA_FTYPE_ALL_")
    return {
        name.removeprefix(prefix): int(getattr(llama_cpp, name))
        for prefix in prefixes
        for name in dir(llama_cpp)
        if name.startswith(prefix)
    }


def quantize(source: str, out: str, quantization: str, threads: int) -> list[str]:
    """Write `source` (a GGUF of F32, F16 or BF16) quantized to `out`; llama.cpp's log lines, fallbacks included.

    Raises UserError for an unknown type, or where llama.cpp refuses, with its own words.
    """
    import llama_cpp

    types = quantization_types()
    if quantization not in types:
        raise UserError(f"no quantization '{quantization}' in this llama.cpp", did_you_mean(quantization, types))
    check_magic(Path(source))
    log = Log()
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = types[quantization]
    params.nthread = threads
    if llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(out), params) != 0:
        raise UserError(
            f"llama.cpp cannot quantize {source} to {quantization}: {log.complaint()}",
            "quantize an undamaged F32, F16 or BF16 GGUF to a type that needs no importance matrix",
        )
    return log.finished_lines()


def check_magic(path: Path) -> None:
    """Refuse what is no GGUF at all; llama.cpp only says that it failed to load it. Raises UserError."""
    remedy = "export the artifact again"
    if not path.is_file():
        raise UserError(f"no GGUF file {path}", "give the path of an existing .gguf file")
    with path.open("rb") as file:
        head = file.read(len(MAGIC))
    if head != MAGIC:
        raise UserError(f"{path} is not a GGUF file: it begins with {head!r} and not with {MAGIC!r}", remedy)


class Log:
    """Takes llama.cpp's log: everything to standard error, whole lines and the errors kept."""

    def __init__(self) -> None:
        import llama_cpp

        self.lines: list[str] = []
        self.errors: list[str] = []
        self._open = ""
        self._level = 0
        # The object must outlive every call: C holds only its address.
        self._callback = llama_cpp.llama_log_callback(self._take)
        llama_cpp.llama_log_set(self._callback, ctypes.c_void_p(0))

    def _take(self, level: int, text: bytes, _user_data: ctypes.c_void_p) -> None:
        decoded = text.decode("utf-8", errors="replace")
        sys.stderr.write(decoded)
        sys.stderr.flush()
        if level != LOG_CONTINUED:
            self._level = level
        *whole, self._open = (self._open + decoded).split("\n")
        for line in whole:
            self.lines.append(line)
            if self._level == LOG_ERROR and line.strip():
                self.errors.append(line.strip())

    def finished_lines(self) -> list[str]:
        return [*self.lines, self._open] if self._open else list(self.lines)

    def complaint(self) -> str:
        """What it said went wrong: the line with the reason, else its first error, else its last line."""
        for line in self.errors:
            reason = re.search(r"(?:error loading model|failed to quantize): (.+)", line)
            if reason:
                return reason.group(1)
        errors = [line for line in self.errors if re.search(r"\w", line)]
        return (errors or self.lines[-1:] or ["it gave no reason"])[0].strip()


class LlamaBackend:
    """A GGUF open in llama.cpp, with one context of one sequence.

    Kept at llama.cpp's defaults, as an app would have it, and recorded: an F16 KV cache, flash
    attention by its own choice, the weights mapped from the file, all layers offloaded where the
    build has a GPU. An encoder (a GGUF whose attention is not causal) gives embeddings and no logits, of
    a whole sequence at once.
    """

    def __init__(
        self, artifact: Path, *, threads: int, context_tokens: int, use_extra_bufts: bool, logits_all: bool
    ) -> None:
        import llama_cpp

        check_magic(artifact)
        self._api = llama_cpp
        self._log = Log()
        self._logits_all = logits_all
        self._threads = threads
        self._use_extra_bufts = use_extra_bufts
        llama_cpp.llama_backend_init()
        started = time.perf_counter()
        model_params = llama_cpp.llama_model_default_params()
        model_params.use_extra_bufts = use_extra_bufts
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(artifact), model_params)
        if not self._model:
            raise UserError(
                f"llama.cpp cannot open {artifact} ({artifact.stat().st_size} bytes): {self._log.complaint()}",
                "the file is damaged, cut short, or of an architecture that this llama.cpp lacks: export it again",
            )
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.vocab_size = int(llama_cpp.llama_vocab_n_tokens(self._vocab))
        self._encoder = self._metadata(f"{self._metadata('general.architecture')}.attention.causal") == "false"
        self._context, self._context_params = self._new_context(context_tokens)
        self.context_tokens = int(llama_cpp.llama_n_ctx(self._context))
        self._n_gpu_layers = int(model_params.n_gpu_layers)
        self._batch_tokens = int(llama_cpp.llama_n_batch(self._context))
        self._batch = llama_cpp.llama_batch_init(self._batch_tokens, 0, 1)
        self._columns = self._batch_columns()
        self._filled = 0
        self.load_ms = (time.perf_counter() - started) * 1e3

    def _new_context(self, context_tokens: int) -> tuple[Any, Any]:
        params = self._api.llama_context_default_params()
        params.n_ctx = context_tokens
        params.n_batch = context_tokens if self._encoder else min(MAX_BATCH_TOKENS, context_tokens)
        params.embeddings = self._encoder
        params.n_ubatch = params.n_batch
        params.n_threads = self._threads
        params.n_threads_batch = self._threads
        if not self._logits_all and not self._encoder and hasattr(params, "n_outputs_max"):
            params.n_outputs_max = 1
        context = self._api.llama_init_from_model(self._model, params)
        if not context:
            raise RuntimeError(f"no context of {context_tokens} tokens: {self._log.complaint()}")
        return context, params

    def _metadata(self, key: str) -> str:
        """A value of the GGUF as text; "" where it is not there."""
        buffer = ctypes.create_string_buffer(64)
        length = self._api.llama_model_meta_val_str(self._model, key.encode(), buffer, len(buffer))
        return buffer.value.decode() if length >= 0 else ""

    def _batch_columns(self) -> dict[str, NDArray[Any]]:
        """numpy views of the C arrays of the batch; every token belongs to sequence 0."""
        size = self._batch_tokens
        for i in range(size):
            self._batch.n_seq_id[i] = 1
            self._batch.seq_id[i][0] = 0
        return {
            "token": np.ctypeslib.as_array(self._batch.token, (size,)),
            "pos": np.ctypeslib.as_array(self._batch.pos, (size,)),
            "logits": np.ctypeslib.as_array(self._batch.logits, (size,)),
        }

    def info(self) -> dict[str, Any]:
        import llama_cpp

        params = self._context_params
        return {
            "runtime": "llama.cpp",
            "runtime_version": f"llama-cpp-python {llama_cpp.__version__}",
            "vocab_size": self.vocab_size,
            "context_tokens": self.context_tokens,
            "load_ms": self.load_ms,
            "options": {
                "use_extra_bufts": self._use_extra_bufts,
                "threads": self._threads,
                "n_batch": self._batch_tokens,
                "n_ubatch": int(params.n_ubatch),
                "kv_cache": [GGML_TYPE_NAMES.get(int(t), f"ggml type {t}") for t in (params.type_k, params.type_v)],
                "flash_attention": FLASH_ATTENTION_NAMES.get(int(params.flash_attn_type), "unknown"),
                "n_gpu_layers": self._n_gpu_layers if llama_cpp.llama_supports_gpu_offload() else 0,
                "system": llama_cpp.llama_print_system_info().decode(errors="replace").strip(),
            },
        }

    def logits(self, tokens_T: NDArray[np.int32]) -> Iterator[NDArray[np.float32]]:
        if not self._logits_all:
            raise ValueError("opened with logits_all=False: only the last token's logits are kept")
        self._require(encoder=False)
        self._clear()
        for start in range(0, len(tokens_T), self._batch_tokens):
            part = tokens_T[start : start + self._batch_tokens]
            self._decode(part, every_row=True)
            # A view of llama.cpp's own buffer: sent before the next batch overwrites it.
            yield np.ctypeslib.as_array(self._api.llama_get_logits(self._context), (len(part), self.vocab_size))

    def embedding(self, tokens_T: NDArray[np.int32]) -> NDArray[np.float32]:
        """[H]: the sequence's embedding, pooled as the GGUF says; [T, H] where it says nothing of pooling."""
        self._require(encoder=True)
        pooled = int(self._api.llama_pooling_type(self._context)) != self._api.LLAMA_POOLING_TYPE_NONE
        self._filled = 0
        self._decode(tokens_T, every_row=True, encode=True)
        width = int(self._api.llama_model_n_embd(self._model))
        if pooled:
            found = np.ctypeslib.as_array(self._api.llama_get_embeddings_seq(self._context, 0), (width,))
        else:
            found = np.ctypeslib.as_array(self._api.llama_get_embeddings(self._context), (len(tokens_T), width))
        return np.array(found, dtype=np.float32)

    def _require(self, *, encoder: bool) -> None:
        if encoder and not self._encoder:
            raise UserError("the artifact is a decoder and gives logits", "export a BERT for embeddings")
        if self._encoder and not encoder:
            raise UserError("the artifact is an encoder and gives embeddings, no logits", "ask for its embedding")

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        if self._api.llama_vocab_type(self._vocab) == NO_VOCABULARY:
            raise UserError("the GGUF holds no tokenizer", "export it with its tokenizer")
        data = text.encode("utf-8")
        size = len(data) + 8
        while True:
            buffer = (self._api.llama_token * size)()
            count = self._api.llama_tokenize(self._vocab, data, len(data), buffer, size, add_special, parse_special)
            if count >= 0:
                return list(buffer[:count])
            if -count <= size:
                raise RuntimeError(f"llama_tokenize answered {count} for {len(data)} bytes of text")
            size = -count

    def timed(self, tokens_T: NDArray[np.int32], new_tokens: int) -> dict[str, Any]:
        self._require(encoder=False)
        self._clear()
        return greedy_timed(self._step, [int(t) for t in tokens_T], new_tokens)

    def _step(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Append tokens to the cache; the last one's logits, [V], valid until the next step."""
        ids = np.asarray(tokens, dtype=np.int32)
        for start in range(0, len(ids), self._batch_tokens):
            self._decode(ids[start : start + self._batch_tokens], every_row=False)
        return np.ctypeslib.as_array(self._api.llama_get_logits_ith(self._context, -1), (self.vocab_size,))

    def _clear(self) -> None:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        self._filled = 0

    def _decode(self, tokens: NDArray[np.int32], *, every_row: bool, encode: bool = False) -> None:
        count = len(tokens)
        self._batch.n_tokens = count
        self._columns["token"][:count] = tokens
        self._columns["pos"][:count] = np.arange(self._filled, self._filled + count)
        self._columns["logits"][:count] = every_row
        self._columns["logits"][count - 1] = True
        run = self._api.llama_encode if encode else self._api.llama_decode
        answer = run(self._context, self._batch)
        if answer != 0:
            raise RuntimeError(
                f"{run.__name__} answered {answer} for {count} tokens at position {self._filled}:"
                f" {self._log.complaint()}"
            )
        self._filled += count
