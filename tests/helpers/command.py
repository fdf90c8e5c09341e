"""The real command line in a process of its own, on a store of its own, with a recipe that takes seconds."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import warm

ROOT = Path(__file__).resolve().parents[2]
TINY = """
name: tiny
data: {{source: {text}, min_document_chars: 200, eval_share: 0.2, calibration_share: 0.1}}
teacher:
  train:
    vocab_size: 320
    tokens: 60_000
    context_tokens: 64
    batch_sequences: 8
    learning_rate: 4.0e-3
    evaluate_every_share: 0.5
    checkpoint_every_s: 0.2
    shape:
      {{hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2,
      num_attention_heads: 4, num_key_value_heads: 2, head_dim: 16}}
distill:
  tokens: 40_000
  context_tokens: 64
  batch_sequences: 8
  learning_rate: 4.0e-3
  evaluate_every_share: 0.5
  checkpoint_every_s: 0.2
verify: {{context_tokens: 64, max_tokens: 3_000, min_retention: 0.1}}
bench: {{prompt_tokens: 8, new_tokens: 8, warmup: 0, repeats: 1}}
"""


def tiny_text(documents: int = 150, seed: int = 0) -> str:
    """Sentences of a small made-up grammar, a blank line between documents."""
    rng = random.Random(seed)
    nouns = ["dog", "cat", "river", "stone", "teacher", "student", "model", "bridge", "lamp", "garden"]
    verbs = ["sees", "finds", "follows", "draws", "builds", "keeps", "measures", "loses"]
    kinds = ["small", "old", "bright", "quiet", "heavy", "green"]

    def sentence() -> str:
        one, two = rng.choice(nouns), rng.choice(nouns)
        return f"the {rng.choice(kinds)} {one} {rng.choice(verbs)} the {two} and the {two} {rng.choice(verbs)} a {one}."

    return "\n\n".join(" ".join(sentence() for _ in range(rng.randint(4, 12))) for _ in range(documents))


@dataclass
class Command:
    """Runs `edgedistill` in `folder`, with `folder`/store as its store."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    warm: bool = False  # in a process that has imported what is heavy (warm.py): seconds less for each command

    def recipe(self) -> str:
        path, text = self.folder / "tiny.yaml", self.folder / "text.txt"
        if not path.exists():
            text.write_text(tiny_text())
            path.write_text(TINY.format(text=text))
        return str(path)

    def arguments(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "edgedistill", *words]

    def env(self) -> dict[str, str]:
        paths = os.pathsep.join(filter(None, [self.environment.get("PYTHONPATH"), str(ROOT)]))
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "EDGEDISTILL_STORE")}
        ours = {"EDGEDISTILL_STORE": str(self.folder / "store"), "HF_HUB_OFFLINE": "1"}
        threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
        return {**kept, **threads, **ours, **self.environment, "PYTHONPATH": paths}

    def __call__(self, *words: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        if self.warm:
            return warm.run(self.arguments(*words), self.folder, self.env(), timeout)
        return subprocess.run(
            self.arguments(*words), capture_output=True, text=True, cwd=self.folder, env=self.env(), timeout=timeout
        )

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.arguments(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self.folder,
            env=self.env(), start_new_session=True,
            # a shell that runs the tests in the background leaves SIGINT ignored, and children inherit that
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip

    def json(self, *words: str) -> Any:
        done = self(*words, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


def refused(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Exit code 2, no traceback, a few lines with cause, value and remedy."""
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith(("target ", "["))]
    assert 1 < len(lines) <= 6, done.stderr
    assert "try: " in done.stderr
    for part in parts:
        assert part in done.stderr, (part, done.stderr)
