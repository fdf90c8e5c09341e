#!/usr/bin/env python3
"""Generate text with this bundle's ONNX model. Needs Python and `pip install onnxruntime-genai`, nothing else.

python samples/python/run.py "Once upon a time" --tokens 64
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

BUNDLE = Path(__file__).resolve().parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="The")
    parser.add_argument("--tokens", type=int, default=64, help="how many to generate at most")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the most likely token")
    args = parser.parse_args()
    manifest = json.loads((BUNDLE / "manifest.json").read_text(encoding="utf-8"))
    artifact = next(a for a in manifest["artifacts"] if a["format"] == "onnx")
    try:
        import onnxruntime_genai as genai
    except ModuleNotFoundError as error:
        print(f"{error}: pip install onnxruntime-genai", file=sys.stderr)
        return 2
    model = genai.Model(str(BUNDLE / artifact["folder"]))
    tokenizer = genai.Tokenizer(model)
    prompt = tokenizer.encode(args.prompt)
    if len(prompt) == 0:
        print("the prompt has no tokens", file=sys.stderr)
        return 2
    params = genai.GeneratorParams(model)
    length = min(artifact["context_tokens"], len(prompt) + args.tokens)
    if args.temperature > 0:
        params.set_search_options(max_length=length, do_sample=True, temperature=args.temperature)
    else:
        params.set_search_options(max_length=length, do_sample=False)
    generator = genai.Generator(model, params)
    started = time.perf_counter()
    generator.append_tokens(prompt)
    stream = tokenizer.create_stream()
    count = 0
    print(args.prompt, end="", flush=True)
    while not generator.is_done():
        generator.generate_next_token()
        print(stream.decode(generator.get_next_tokens()[0]), end="", flush=True)
        count += 1
    print()
    print(f"{count} tokens in {time.perf_counter() - started:.2f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
