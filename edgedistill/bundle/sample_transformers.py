#!/usr/bin/env python3
"""Generate text with this bundle's bitsandbytes model, on a GPU where there is one.

Needs Python and `pip install torch transformers accelerate bitsandbytes`, nothing else.

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
    artifact = next(a for a in manifest["artifacts"] if a["format"] == "bitsandbytes")
    try:
        import bitsandbytes  # noqa: F401  transformers asks for it late and less clearly
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
    except ModuleNotFoundError as error:
        print(f"{error}: pip install torch transformers accelerate bitsandbytes", file=sys.stderr)
        return 2
    folder = BUNDLE / artifact["folder"]
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": device}).eval()
    prompt = tokenizer(args.prompt, return_tensors="pt", return_token_type_ids=False).to(device)
    if prompt["input_ids"].shape[1] == 0:
        print("the prompt has no tokens", file=sys.stderr)
        return 2
    count = min(args.tokens, artifact["context_tokens"] - prompt["input_ids"].shape[1])
    chosen = {"do_sample": True, "temperature": args.temperature} if args.temperature > 0 else {"do_sample": False}
    started = time.perf_counter()
    chosen |= {"max_new_tokens": count, "pad_token_id": model.config.eos_token_id}
    found = model.generate(**prompt, **chosen, streamer=TextStreamer(tokenizer, skip_special_tokens=True))
    made = found.shape[1] - prompt["input_ids"].shape[1]
    print(f"{made} tokens in {time.perf_counter() - started:.2f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
