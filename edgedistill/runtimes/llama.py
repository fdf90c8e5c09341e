"""llama.cpp, in the child process: decoding, embeddings, its tokenizer.

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

from edgedistill.errors import UserError
from edgedistill.runtimes.backend import greedy_timed
from edgedistill.runtimes.llama_trace import Tracer

MAGIC = b"GGUF"
MAX_BATCH_TOKENS = 512
NO_VOCABULARY = 0  # LLAMA_VOCAB_TYPE_NONE
LOG_ERROR = 4  # GGML_LOG_LEVEL_ERROR
LOG_CONTINUED = 5  # GGML_LOG_LEVEL_CONT
GGML_TYPE_NAMES = {0: "f32", 1: "f16", 8: "q8_0", 30: "bf16"}
FLASH_ATTENTION_NAMES = {-1: "auto", 0: "off", 1: "on"}


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
    a whole sequence at once. With `context_tokens` 0 the vocabulary alone is read, and
    `tokenize` is all that works.
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
        model_params.vocab_only = context_tokens == 0
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(artifact), model_params)
        if not self._model:
            raise UserError(
                f"llama.cpp cannot open {artifact} ({artifact.stat().st_size} bytes): {self._log.complaint()}",
                "the file is damaged, cut short, or of an architecture that this llama.cpp lacks: export it again",
            )
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.vocab_size = int(llama_cpp.llama_vocab_n_tokens(self._vocab))
        self._encoder = self._metadata(f"{self._metadata('general.architecture')}.attention.causal") == "false"
        self._n_gpu_layers = int(model_params.n_gpu_layers)
        self._context_params = self._wanted_context(context_tokens)
        self.context_tokens = self._batch_tokens = 0
        if context_tokens:
            self._open_context(context_tokens)
        self.load_ms = (time.perf_counter() - started) * 1e3

    def _open_context(self, context_tokens: int) -> None:
        llama_cpp = self._api
        self._context = llama_cpp.llama_init_from_model(self._model, self._context_params)
        if not self._context:
            raise RuntimeError(f"no context of {context_tokens} tokens: {self._log.complaint()}")
        self.context_tokens = int(llama_cpp.llama_n_ctx(self._context))
        self._batch_tokens = int(llama_cpp.llama_n_batch(self._context))
        self._batch = llama_cpp.llama_batch_init(self._batch_tokens, 0, 1)
        self._columns = self._batch_columns()
        self._filled = 0

    def _wanted_context(self, context_tokens: int, tracer: Tracer | None = None) -> Any:
        params = self._api.llama_context_default_params()
        if tracer is not None:
            params.cb_eval = tracer.callback
        params.n_ctx = context_tokens
        params.n_batch = context_tokens if self._encoder else min(MAX_BATCH_TOKENS, context_tokens)
        params.embeddings = self._encoder
        params.n_ubatch = params.n_batch
        params.n_threads = self._threads
        params.n_threads_batch = self._threads
        if not self._logits_all and not self._encoder and hasattr(params, "n_outputs_max"):
            params.n_outputs_max = 1
        return params

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

    def trace(self, tokens_T: NDArray[np.int32], names: Sequence[str]) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """The nodes of these names for one batch from an empty cache, flat, in the order of their computation."""
        if not self._logits_all or len(tokens_T) > self._batch_tokens:
            raise ValueError(f"a trace takes logits_all and at most {self._batch_tokens} tokens")
        tracer = Tracer(names)
        plain = self._context
        self._context = self._api.llama_init_from_model(self._model, self._wanted_context(self.context_tokens, tracer))
        try:
            self._clear()
            self._decode(tokens_T, every_row=True)
        finally:
            self._api.llama_free(self._context)
            self._context = plain
            self._clear()
        yield from tracer.taken()

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

    def generation(self) -> dict[str, Any]:
        """Where llama.cpp stops and what it puts around a text: of the vocabulary alone too. -1: there is none."""
        api, vocab = self._api, self._vocab
        template = api.llama_model_chat_template(self._model, None)
        return {
            "stops": [token for token in range(self.vocab_size) if api.llama_vocab_is_eog(vocab, token)],
            "bos": int(api.llama_vocab_bos(vocab)),
            "eos": int(api.llama_vocab_eos(vocab)),
            "adds_bos": bool(api.llama_vocab_get_add_bos(vocab)),
            "adds_eos": bool(api.llama_vocab_get_add_eos(vocab)),
            "template": None if template is None else template.decode("utf-8", errors="surrogateescape"),
        }

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
