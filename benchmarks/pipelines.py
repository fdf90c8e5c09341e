"""Raw input → original pipeline against raw input → exported folder: each tokenizer, image processor, family and task.

    python benchmarks/pipelines.py --check                       all parts
    python benchmarks/pipelines.py families --only longt5 led    those of these names

Every checkpoint is tiny, random and made here. It is exported by the command line (FP32) and removed; the exported folder
is moved and opened by transformers' AutoTokenizer or AutoImageProcessor and onnxruntime. The shortest, a middle and the
longest input, odd text, a padded batch and pairs have to be equal within the stated limit; text2text models write eight
tokens greedily, logits and tokens are compared with transformers' generate. What is refused counts apart, and has to be
refused for the reason that tests/pipelines/ names. Needs sentencepiece and sacremoses for the tokenizers that use them.

A case that is run again replaces its line in results/pipelines.json; the others stay, with their dates. SIGINT ends it after
the case that it is at.
"""

from __future__ import annotations

import collections
import datetime
import json
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "helpers"))

from command import Command
from common import RESULTS, Bound, finish, parser
from pipelines import cases
from pipelines.compare import CLASSES, LIMIT

# part → the kind of its cases, and how many have to be equal
PARTS = {"tokenizers": (cases.TOKENIZER, 40), "images": (cases.IMAGE, 20), "families": (cases.FAMILY, 0)}
FAMILIES = 50  # of all parts together


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
    asked.add_argument("--only", nargs="*", default=[], help="cases whose name begins with one of these")
    arguments = asked.parse_args()
    kinds = {PARTS[part][0] for part in arguments.parts or PARTS}
    chosen = [
        case for case in cases.cases()
        if case.kind in kinds and (not arguments.only or case.name.startswith(tuple(arguments.only)))
    ]  # fmt: skip
    figures = kept()
    ended: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _frame: ended.append(number))
    for case in chosen:
        if ended:
            break
        if case.missing:
            print(f"{case.name}: left out, {', '.join(case.missing)} is not installed", file=sys.stderr, flush=True)
            continue
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="edgedistill-pipelines-") as work:
            try:
                found = cases.run(case, Path(work), exporter(Path(work)))
            except Exception as error:  # the original, or the exported folder, does not open or run
                found = cases.Outcome("wrong", said=f"{type(error).__name__}: {error}")
        figures[f"{case.kind}: {case.name}"] = {
            "kind": case.kind, "family": case.family, "task": case.task, "settings": case.settings,
            "state": found.state, "relative_rms": found.error, "inputs": list(found.inputs), "said": found.said,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        }  # fmt: skip
        seconds = f"{time.monotonic() - started:.0f} s"
        print(case.name, found.state, found.error or "", found.said[:600], seconds, file=sys.stderr, flush=True)
    known = {f"{case.kind}: {case.name}" for case in cases.cases()}
    figures = {name: figure for name, figure in figures.items() if name in known}
    counts = collections.Counter((figure["kind"], figure["state"]) for figure in figures.values())
    equal = [figure for figure in figures.values() if figure["state"] == "equal"]
    wrong = sum(count for (_, state), count in counts.items() if state == "wrong")
    largest = max((figure["relative_rms"] or 0.0 for figure in figures.values()), default=0.0)
    finish(
        "pipelines", arguments, figures=figures,
        header=("case", "family", "task", "state", "difference"),
        rows=[
            (name, f["family"], f["task"], f["state"], "" if f["relative_rms"] is None else f"{f['relative_rms']:.1e}")
            for name, f in figures.items()
        ],
        bounds=[
            Bound("cases that are not equal, or refused for another reason", wrong, "<=", 0),
            Bound("largest relative difference", largest, "<=", LIMIT),
            *(Bound(f"{kind}: equal", counts[kind, "equal"], ">=", least) for kind, least in PARTS.values() if least),
            Bound("different families, equal", len({f["family"] for f in equal}), ">=", FAMILIES),
            Bound("tasks, equal", len({f["task"] for f in equal}), ">=", len(CLASSES)),
        ],
        notes=[f"{kind}: {count} {state}" for (kind, state), count in sorted(counts.items())],
    )  # fmt: skip


def kept() -> dict[str, Any]:
    """The cases of the saved result, which this run's replace: a full run takes an hour, and each case is by itself."""
    path = RESULTS / "pipelines.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))["figures"]) if path.is_file() else {}


if __name__ == "__main__":
    main()
