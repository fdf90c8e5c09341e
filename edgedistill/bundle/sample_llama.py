#!/usr/bin/env python3
"""Generate text with this bundle's model. Needs Python and `pip install llama-cpp-python`, nothing else.

python samples/python/run.py "Once upon a time" --tokens 64
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

BUNDLE = Path(__file__).resolve().parents[2]


def load(path: Path, *, context_tokens: int, threads: int, extra_buffers: bool, verbose: bool) -> Any:
    """The model. llama.cpp's extra buffers make Q4_0 fast on ARM, and crash some builds on x86 with AMX
    (SIGILL or SIGSEGV at the first batch), so there they are off unless they are asked for."""
    import llama_cpp
    import llama_cpp.llama_cpp as api

    defaults = api.llama_model_default_params

    # `Llama` has no argument for it, and takes everything else from these defaults.
    def with_choice() -> Any:
        params = defaults()
        params.use_extra_bufts = extra_buffers
        return params

    api.llama_model_default_params = with_choice
    return llama_cpp.Llama(
        model_path=str(path), n_ctx=context_tokens, n_threads=threads, n_threads_batch=threads, verbose=verbose
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="The")
    parser.add_argument("--tokens", type=int, default=64, help="how many to generate at most")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the most likely token")
    parser.add_argument("--threads", type=int, default=min(4, os.cpu_count() or 1))
    on_arm = platform.machine().lower() in ("aarch64", "arm64")
    parser.add_argument(
        "--extra-buffers", action=argparse.BooleanOptionalAction, default=on_arm, help="llama.cpp's repacked weights"
    )
    parser.add_argument("--verbose", action="store_true", help="show llama.cpp's own log")
    args = parser.parse_args()
    manifest = json.loads((BUNDLE / "manifest.json").read_text(encoding="utf-8"))
    artifact = next(a for a in manifest["artifacts"] if a["format"] == "gguf")
    try:
        model = load(
            BUNDLE / artifact["folder"] / artifact["entry"],
            context_tokens=min(artifact["context_tokens"], 4096),
            threads=args.threads,
            extra_buffers=args.extra_buffers,
            verbose=args.verbose,
        )
    except ModuleNotFoundError as error:
        print(f"{error}: pip install llama-cpp-python", file=sys.stderr)
        return 2
    started = time.perf_counter()
    count = 0
    print(args.prompt, end="", flush=True)
    for part in model.create_completion(args.prompt, max_tokens=args.tokens, temperature=args.temperature, stream=True):
        print(part["choices"][0]["text"], end="", flush=True)
        count += 1
    print()
    print(f"{count} pieces in {time.perf_counter() - started:.2f} s", file=sys.stderr)
    model.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
