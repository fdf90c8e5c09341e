"""transformers, in the child process: a folder with its own quantization_config, as a server would load it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgedistill.errors import UserError
from edgedistill.guards.tokenizer import TOKENIZER, check_tokenizer_json
from edgedistill.runtimes.backend import greedy_timed


class FolderBackend:
    """A bitsandbytes folder open in torch, on the GPU where there is one."""

    def __init__(
        self, artifact: Path, *, threads: int, context_tokens: int, use_extra_bufts: bool, logits_all: bool
    ) -> None:
        del use_extra_bufts, logits_all  # llama.cpp's
        import torch
        import transformers

        from edgedistill.models.bitsandbytes import open_folder

        torch.set_num_threads(threads)
        self._torch = torch
        self._folder = artifact
        self._threads = threads
        if (artifact / TOKENIZER).is_file():
            check_tokenizer_json(artifact / TOKENIZER)
        started = time.perf_counter()
        try:
            self._model = open_folder(artifact)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(f"transformers cannot open {artifact}: {str(error)[:500]}", "export it again") from error
        self.load_ms = (time.perf_counter() - started) * 1e3
        self.vocab_size = int(self._model.config.vocab_size)
        self.context_tokens = min(context_tokens, int(self._model.config.max_position_embeddings))
        self._version = f"transformers {transformers.__version__}"

    def info(self) -> dict[str, Any]:
        import bitsandbytes

        return {
            "runtime": "transformers",
            "runtime_version": f"{self._version}, bitsandbytes {bitsandbytes.__version__}",
            "vocab_size": self.vocab_size,
            "context_tokens": self.context_tokens,
            "load_ms": self.load_ms,
            "options": {
                "threads": self._threads,
                "device": self._model.device.type,
                # what `measure` asks of every runtime: whether the target's GPU was used
                "n_gpu_layers": -1 if self._model.device.type == "cuda" else 0,
            },
        }

    def logits(self, tokens_T: NDArray[np.int32]) -> Iterator[NDArray[np.float32]]:
        yield self._run(tokens_T, None).logits[0].float().cpu().numpy()

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        from edgedistill.models.hf_tokenizer import open_tokenizer

        tokenizer = open_tokenizer(self._folder / "tokenizer.json")
        tokenizer.encode_special_tokens = not parse_special
        return [int(token) for token in tokenizer.encode(text, add_special_tokens=add_special).ids]

    def generation(self) -> dict[str, Any]:
        """Where transformers stops, and the settings that it generates with."""
        config = self._model.generation_config
        eos = config.eos_token_id
        settings = config.to_diff_dict()
        return {
            "stops": [] if eos is None else [int(token) for token in (eos if isinstance(eos, list) else [eos])],
            "settings": {k: v for k, v in settings.items() if isinstance(v, int | float | str | bool | list)},
        }

    def timed(self, tokens_T: NDArray[np.int32], new_tokens: int) -> dict[str, Any]:
        cache: Any = None

        def step(tokens: Sequence[int]) -> NDArray[np.float32]:
            nonlocal cache
            output = self._run(np.asarray(tokens), cache, cached=True)
            cache = output.past_key_values
            last: NDArray[np.float32] = output.logits[0, -1].float().cpu().numpy()
            return last

        return greedy_timed(step, [int(t) for t in tokens_T], new_tokens)

    def _run(self, tokens_T: NDArray[Any], cache: Any, *, cached: bool = False) -> Any:
        ids = self._torch.from_numpy(tokens_T.astype(np.int64))[None].to(self._model.device)
        with self._torch.inference_mode():
            return self._model(input_ids=ids, past_key_values=cache, use_cache=cached)
