"""onnxruntime-genai, in the child process: the runtime that phone apps use for ONNX decoders.

Tokens are appended one at a time and the best one is picked from the logits here, not by its search:
so decoding does not stop at an end-of-sequence token, and no logit is masked to make it go on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgedistill.errors import UserError
from edgedistill.guards.tokenizer import TOKENIZER, check_tokenizer_json
from edgedistill.machine import waiting
from edgedistill.runtimes.backend import greedy_timed
from edgedistill.runtimes.ort import genai_config


class GenaiBackend:
    """A folder with genai_config.json open in onnxruntime-genai on the CPU."""

    def __init__(
        self, artifact: Path, *, threads: int, context_tokens: int, use_extra_bufts: bool, logits_all: bool
    ) -> None:
        del use_extra_bufts, logits_all  # llama.cpp's
        import onnxruntime_genai as og

        self._folder = artifact
        model = genai_config(self._folder)["model"]
        check_tokenizer_json(artifact / TOKENIZER)
        self._og = og
        self._threads = threads
        self.vocab_size = int(model["vocab_size"])
        self.context_tokens = min(context_tokens, int(model.get("context_length", context_tokens)))
        og.disable_telemetry_events()
        session_options: dict[str, Any] = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        if waiting.sleeps_soon():
            session_options[waiting.ONNXRUNTIME_SPINS] = "0"
        started = time.perf_counter()
        try:
            config = og.Config(str(self._folder))
            # Laid over the artifact's own settings in memory: its bytes stay as they ship.
            config.overlay(json.dumps({"model": {"decoder": {"session_options": session_options}}}))
            self._model = og.Model(config)
            self._tokenizer = og.Tokenizer(self._model)
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(
                f"onnxruntime-genai cannot open {self._folder}: {str(error)[:500]}",
                "the model or one of its files is damaged or missing: export it again",
            ) from error
        self.load_ms = (time.perf_counter() - started) * 1e3

    def info(self) -> dict[str, Any]:
        return {
            "runtime": "onnxruntime-genai",
            "runtime_version": f"onnxruntime-genai {self._og.__version__}",
            "vocab_size": self.vocab_size,
            "context_tokens": self.context_tokens,
            "load_ms": self.load_ms,
            "options": {"threads": self._threads, "device": str(self._model.device_type)},
        }

    def logits(self, tokens_T: NDArray[np.int32]) -> Iterator[NDArray[np.float32]]:
        generator = self._generator(len(tokens_T))
        generator.append_tokens(tokens_T)
        rows = np.asarray(generator.get_output("logits")[0], dtype=np.float32)
        if rows.shape != (len(tokens_T), self.vocab_size):
            raise UserError(
                f"the model gives logits of shape {list(rows.shape)} for {len(tokens_T)} tokens",
                "export it so that it keeps the logits of every position",
            )
        yield rows

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Special tokens are always parsed: raises UserError where there are some and `parse_special` is off."""
        if not parse_special:
            found = [token for token in self._special_tokens() if token in text]
            if found:
                raise UserError(
                    f"onnxruntime-genai cannot read {found[0]!r} as plain text", "tokenize with parse_special=True"
                )
        self._tokenizer.update_options(add_special_tokens=str(add_special).lower())
        return [int(token) for token in self._tokenizer.encode(text)]

    def generation(self) -> dict[str, Any]:
        """Where onnxruntime-genai stops, and the settings that its search starts with."""
        params = self._og.GeneratorParams(self._model)
        return {
            "stops": [int(token) for token in self._tokenizer.eos_token_ids],
            "bos": int(self._tokenizer.bos_token_id),
            "search": {key: _plain(value) for key, value in dict(params.get_search_options()).items()},
        }

    def _special_tokens(self) -> list[str]:
        try:
            added = json.loads((self._folder / "tokenizer.json").read_text(encoding="utf-8")).get("added_tokens", [])
            return [str(token["content"]) for token in added]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"tokenizer.json of {self._folder} cannot be read: {error}", "export it again") from error

    def timed(self, tokens_T: NDArray[np.int32], new_tokens: int) -> dict[str, Any]:
        # The whole context, as an app would ask for: the KV cache is allocated at once.
        generator = self._generator(self.context_tokens)

        def step(tokens: Sequence[int]) -> NDArray[np.float32]:
            generator.append_tokens(np.asarray(tokens, dtype=np.int32))
            last: NDArray[np.float32] = generator.get_logits()[0, -1]
            return last

        return greedy_timed(step, [int(t) for t in tokens_T], new_tokens)

    def _generator(self, tokens: int) -> Any:
        params = self._og.GeneratorParams(self._model)
        params.set_search_options(max_length=tokens, do_sample=False, batch_size=1)
        return self._og.Generator(self._model, params)


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str) else str(value)
