"""What a large vocabulary costs where nothing is computed: seconds of `export`, `verify`, `bundle` and its `verify`,
`plan` and a `build` whose every stage is in the store.

The models are llamas of random weights, one layer and 16 to 34 MB, with byte-level BPE tokenizers of random merges as
large as TinyLlama's (32,000), Qwen's (151,936) and Gemma 3's (262,144). Each command is a process of its own; user CPU
seconds are its own and those of the processes that it started, and are what to compare on a machine that does other
work too. The first `build` fills the store and is not counted.
Claims, on two idle cores, for every vocabulary: `export` at most 15 s; `bundle verify` at most 5 s beyond its replay;
a `build` that finds everything in the store, and writes its bundle anew, at most 10 s.
`--profile` prints the ten functions with most time of their own for each command (cProfile, the command's own process
alone), and measures nothing else.
"""

from __future__ import annotations

import cProfile
import io
import json
import os
import pstats
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import Bound, finish, parser

# vocabulary → hidden size, in 16 bits: 16, 19 and 34 MB of embeddings
SIZES = {32_000: 256, 151_936: 64, 262_144: 64}
TARGET = "phone-arm64-high"
MOST_EXPORT_S, MOST_VERIFY_S, MOST_BUILD_S = 15.0, 5.0, 10.0
SEALED = "bundle verify, no replay"
TABLE = "== top ten"
LONGEST_TOKEN = 24
SCORED_TOKENS = 1024  # scoring is work, and not what is looked for here
WORDS = [
    "the", "model", "device", "small", "large", "teacher", "student", "word", "text", "reads", "writes", "learns",
    "keeps", "weight", "number", "line", "page", "quick", "slow", "house", "river", "stone", "light", "evening",
]  # fmt: skip
# Runs a command as `python -m edgedistill` does; `bundle verify` without its replay is no command.
SEALED_ALONE = """
import sys
from pathlib import Path
from edgedistill.bundle.check import verify_bundle
verify_bundle(Path(sys.argv[1]), replay=False)
"""


def make_model(folder: Path, vocab_size: int) -> None:
    """A llama whose next token is the one that it read, by a wide margin: golden vectors are sure of it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden = SIZES.get(vocab_size, 64)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
            bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0.0, 0.5)
    model.to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer(folder, vocab_size)


def make_tokenizer(folder: Path, vocab_size: int) -> None:
    """A byte-level BPE in Qwen's way: its merges are drawn, each of a token that is there already and a byte."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    rng = np.random.default_rng(0)
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    alphabet = list(pieces)
    vocabulary = {"<|endoftext|>": 0, **{piece: index + 1 for index, piece in enumerate(pieces)}}
    merges = []
    while len(vocabulary) < vocab_size:
        left, right = pieces[int(rng.random() * len(pieces))], alphabet[int(rng.random() * len(alphabet))]
        if len(left) < LONGEST_TOKEN and left + right not in vocabulary:
            merges.append((left, right))
            vocabulary[left + right] = len(vocabulary)
            pieces.append(left + right)
    cuts = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(cuts), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def make_text(path: Path, documents: int, seed: int) -> None:
    """Documents of drawn words: what a text says costs nothing here."""
    rng = np.random.default_rng(seed)
    blocks = [" ".join(rng.choice(WORDS, 60)) + "." for _ in range(documents)]
    path.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")


def commands_of(scratch: Path) -> dict[str, list[str]]:
    """Name → its words, in an order in which each finds what it needs: the first `build` fills the store."""
    model, text, held_out = (str(scratch / name) for name in ("model", "text.txt", "held-out.txt"))
    exported, bundles = str(scratch / "exported"), str(scratch / "bundles")
    recipe = ["--teacher", model, "--student", model, "--data", text, "--target", TARGET]
    for setting in (
        "name=vocabulary", "distill.tokens=512", "distill.context_tokens=64", "distill.batch_sequences=4",
        "distill.learning_rate=1e-9", "distill.tracker=null", "export.artifacts=gguf:Q8_0", "verify.min_retention=0",
        f"verify.max_tokens={SCORED_TOKENS}", "bench.prompt_tokens=16", "bench.new_tokens=16", "bench.warmup=0", "bench.repeats=3",
    ):  # fmt: skip
        recipe += ["--set", setting]
    bundle = f"{bundles}/vocabulary-{TARGET}"
    return {
        "export": ["export", "--student", model, "--quantization", "Q4_0", "--out", exported],
        "verify": [
            "verify",
            exported,
            "--student",
            model,
            "--data",
            held_out,
            "--min-retention",
            "0",
            "--set",
            f"verify.max_tokens={SCORED_TOKENS}",
        ],
        "first build": ["build", *recipe, "--out", bundles],
        "build": ["build", *recipe, "--out", bundles],
        "bundle": ["bundle", *recipe, "--out", bundles],
        "plan": ["plan", *recipe],
        "bundle verify": ["bundle", "verify", bundle],
        SEALED: [bundle],
    }


def child(profile: str, name: str, *words: str) -> None:
    """One command in this process, under cProfile where `profile` is "1", whose table then ends standard error."""
    sys.argv = ["edgedistill", *words]
    profiler = cProfile.Profile()
    if profile == "1":
        profiler.enable()
    try:
        if name == SEALED:
            exec(SEALED_ALONE, {})
        else:
            from edgedistill.__main__ import main as run

            run()
    finally:
        profiler.disable()
        if profile == "1":
            table = io.StringIO()
            pstats.Stats(profiler, stream=table).strip_dirs().sort_stats("tottime").print_stats(10)
            print(f"{TABLE}\n{table.getvalue().strip()}", file=sys.stderr)


def timed(name: str, words: list[str], store: Path, *, profile: bool) -> tuple[dict[str, float], str]:
    """Wall and user CPU seconds of a command, and what it said to standard error."""
    environment = {**os.environ, "EDGEDISTILL_STORE": str(store), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--child", "1" if profile else "0", name, *words]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # 4: the bundle stands, and the machine that measures is no phone
    if done.returncode not in (0, 4):
        sys.exit(f"{name} failed with {done.returncode}:\n{done.stderr[-3000:]}")
    user = after.ru_utime - before.ru_utime
    return {"seconds": seconds, "user_cpu_s": user, "system_cpu_s": after.ru_stime - before.ru_stime}, done.stderr


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
        return
    asked = parser(__doc__)
    asked.add_argument("--profile", action="store_true", help="print each command's top ten instead")
    asked.add_argument("--vocabulary", type=int, action="append", help=f"default: {', '.join(map(str, SIZES))}")
    asked.add_argument("--only", action="append", help="commands to run; what they need must be in --folder")
    asked.add_argument("--folder", type=Path, default=None, help="keep models and store there, and use what is there")
    arguments = asked.parse_args()
    figures: dict[str, Any] = {}
    rows: list[tuple[str, ...]] = []
    bounds: list[Bound] = []
    with tempfile.TemporaryDirectory(prefix="edgedistill-vocabulary-") as temporary:
        for vocab_size in arguments.vocabulary or SIZES:
            scratch = (arguments.folder or Path(temporary)) / str(vocab_size)
            found = measure(scratch, vocab_size, only=arguments.only, profile=arguments.profile)
            figures[str(vocab_size)] = found
            for name, one in found.items():
                rows.append((f"{vocab_size:,}", name, *(f"{one[key]:.2f}" for key in one)))
            for name, most in (("export", MOST_EXPORT_S), (SEALED, MOST_VERIFY_S), ("build", MOST_BUILD_S)):
                if name in found:
                    bounds.append(Bound(f"{vocab_size:,}: {name}, seconds", found[name]["seconds"], "<=", most))
    if arguments.profile:
        return
    finish(
        "vocabulary_speed", arguments, figures=figures, rows=rows, bounds=bounds,
        header=("vocabulary", "command", "seconds", "user CPU (s)", "system CPU (s)"),
        notes=["one run each; user and system CPU are of the command and all processes that it started"],
    )  # fmt: skip


def measure(scratch: Path, vocab_size: int, *, only: list[str] | None, profile: bool) -> dict[str, dict[str, float]]:
    """Command → its seconds; profiles go to standard output as they are made."""
    if not (scratch / "model" / "tokenizer.json").is_file():
        (scratch / "model").mkdir(parents=True)
        make_model(scratch / "model", vocab_size)
        make_text(scratch / "text.txt", 100, seed=1)
        make_text(scratch / "held-out.txt", 20, seed=2)
    found = {}
    for name, words in commands_of(scratch).items():
        if only is not None and name not in only:
            continue
        if name == "export":
            subprocess.run(["rm", "-rf", words[-1]], check=True)
        fresh = name == "verify"  # what its own store would give back is no verification
        with tempfile.TemporaryDirectory(prefix="edgedistill-store-") as empty:
            store = Path(empty) if fresh else scratch / "store"
            one, said = timed(name, words, store, profile=profile and name != "first build")
        print(f"{vocab_size:,} {name}: {one['seconds']:.1f} s", file=sys.stderr, flush=True)
        if profile and name != "first build":
            print(f"== {name}, vocabulary of {vocab_size:,}{said.rpartition(TABLE)[2]}", flush=True)
        if name != "first build":
            found[name] = one
    return found


if __name__ == "__main__":
    main()
