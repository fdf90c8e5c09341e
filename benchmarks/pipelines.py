"""Raw input → original pipeline against raw input → exported folder: each tokenizer, image processor, family and task.

    python benchmarks/pipelines.py --check                       all parts
    python benchmarks/pipelines.py tokenizers --only Bert        those whose name holds a word

Every checkpoint is tiny, random and made here. It is exported by the command line (FP32) and removed; the exported folder
is moved and opened by transformers' AutoTokenizer or AutoImageProcessor and onnxruntime. The shortest, a middle and the
longest input, odd text, a padded batch and pairs have to be equal within the stated limit; text2text models write eight
tokens greedily, logits and tokens are compared with transformers' generate. What is refused counts apart, and has to be
refused for the reason that tests/pipelines/ names. Needs sentencepiece and sacremoses for the tokenizers that use them.

Parts that are named have a result of their own (pipelines_images.json).
"""

from __future__ import annotations

import collections
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from command import Command
from common import Bound, finish, parser
from pipelines import cases
from pipelines.compare import LIMIT

# part → the kind of its cases, and how many different ones have to be equal
PARTS = {"tokenizers": (cases.TOKENIZER, 40), "images": (cases.IMAGE, 20), "families": (cases.FAMILY, 100)}


def exporter(folder: Path) -> cases.Export:
    command = Command(folder, warm=True)

    def export(student: Path, out: Path, task: str) -> tuple[int, str]:
        words = ["export", "--student", str(student), "--format", "onnx", "--quantization", "FP32", "--out", str(out)]
        done = command(*words, *(["--task", task] if task else []), timeout=600)
        return done.returncode, done.stderr

    return export


def main() -> None:
    asked = parser(__doc__)
    asked.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    asked.add_argument("--only", nargs="*", default=[], help="cases whose name holds one of these")
    arguments = asked.parse_args()
    kinds = {PARTS[part][0] for part in arguments.parts or PARTS}
    figures, rows = {}, []
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    for case in cases.cases():
        if case.kind not in kinds or (arguments.only and not any(word in case.name for word in arguments.only)):
            continue
        if case.missing:
            print(f"{case.name}: left out, {', '.join(case.missing)} is not installed", file=sys.stderr, flush=True)
            counts[case.kind, "left out"] += 1
            continue
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="edgedistill-pipelines-") as work:
            try:
                found = cases.run(case, Path(work), exporter(Path(work)))
            except Exception as error:  # the original, or the exported folder, does not open or run
                found = cases.Outcome("wrong", said=f"{type(error).__name__}: {error}")
        counts[case.kind, found.state] += 1
        error = "" if found.error is None else f"{found.error:.1e}"
        rows.append((case.kind, case.name, case.family, case.task, found.state, error, found.said[:60]))
        print(*rows[-1][:6], found.said[:600], f"{time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        figures[f"{case.kind}: {case.name}"] = {
            "family": case.family, "task": case.task, "settings": case.settings, "state": found.state,
            "relative_rms": found.error, "inputs": list(found.inputs), "said": found.said,
        }  # fmt: skip
    bounds = [
        Bound("cases that are not equal, or refused for another reason", sum(
            count for (_, state), count in counts.items() if state == "wrong"
        ), "<=", 0),
        Bound("largest relative difference", max([f["relative_rms"] or 0.0 for f in figures.values()], default=0.0), "<=", LIMIT),
    ]  # fmt: skip
    for kind, least in PARTS.values():
        if kind in kinds and not arguments.only:
            bounds.append(Bound(f"{kind}: equal", counts[kind, "equal"], ">=", least))
    finish(
        "_".join(["pipelines", *arguments.parts]), arguments, figures=figures,
        header=("kind", "class or family", "family", "task", "state", "difference", "said"), rows=rows, bounds=bounds,
        notes=[f"{kind}: {count} {state}" for (kind, state), count in sorted(counts.items())],
    )  # fmt: skip


if __name__ == "__main__":
    main()
