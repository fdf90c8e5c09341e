"""ONNX artifacts of a text and an image classifier against those of optimum-onnx and of Olive, float and INT8.

Models: MiniLM fine-tuned on SST-2, and ResNet-56 for CIFAR-10 (onnx_peers_models.py). The peers write their models in
environments of their own, with the configurations that they recommend for this processor (onnx_peers_optimum.py,
onnx_peers_olive.py); all models then run here, in one process and one onnxruntime, with the same threads: SST-2's
development sentences one at a time at their own length, images one at a time.

Latency: rounds, in each of which every contender runs the same few inputs in turn, the order rotated, in a session that is
opened anew every tenth round: where a session's memory happens to lie is worth some per cent. A ratio is the
median over the rounds of ours ÷ theirs, with its 95 % interval. With one thread what is compared is that thread's
processor time, so that other work on the machine does not count; the time on the wall is in the result too. Accuracy: 872 sentences or 1,000 images (fewer with --held-out);
the difference has the paired 95 % interval over them. The ResNet was trained on these images before JPEG: its
accuracy says what quantizing costs, not how well it generalises.

    pip install -e '.[build,benchmarks]'
    pip install 'optimum-onnx[onnxruntime]'     # in an environment of its own
    pip install olive-ai onnxruntime            # in another
    python benchmarks/onnx_peers.py --optimum-python OPTIMUM/bin/python --olive-python OLIVE/bin/python --check --save

Claims, for each model and precision, against the better of the two in each respect (of what keeps its accuracy: whose
interval below its own float is not wholly beyond two points): the upper bound of the latency ratio is at most 1.03, the
size at most 1.02 of theirs, and the accuracy no lower beyond the paired interval.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Bound, finish, parser
from numpy.typing import NDArray
from onnx_peers_models import CALIBRATION, Feed, Task, classifier, image_task, resnet56, text_task, write_job
from trainer_setup import Ratio, paired
from transformers.utils import logging as transformers_logging

from edgedistill import statistics
from edgedistill.cli.show import human_bytes
from edgedistill.onnx.encoder import export_encoder, export_module
from edgedistill.quantization.options import ExportOptions
from edgedistill.statistics import ByUnit

HERE = Path(__file__).resolve().parent
DATA = Path(os.environ.get("EDGEDISTILL_TEST_DATA", HERE.parents[1] / "shared" / "data"))
MODELS, PRECISIONS = ("minilm", "resnet"), ("FP32", "INT8", "INT8-DYNAMIC")
REOPEN, WARM = 10, 8  # rounds of one session, inputs that it warms up with
LATENCY, SIZE, KEPT = 1.03, 1.02, -0.02


@dataclass
class Contender:
    """An artifact of one model and precision, and what was measured of it."""

    name: str
    graph: Path
    session: Any = None
    correct: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, dtype=bool))
    seconds: list[float] = field(default_factory=list)
    wall_seconds: list[float] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(file.stat().st_size for file in self.graph.parent.glob(f"{self.graph.name}*"))

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())

    def run(self, feed: Feed) -> NDArray[np.float32]:
        """Logits [1, classes]."""
        found: NDArray[np.float32] = self.session.run(None, {name: feed[name] for name in self.inputs})[0]
        return found

    def open(self, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
        self.session = onnxruntime.InferenceSession(str(self.graph), options, ["CPUExecutionProvider"])
        self.inputs = [value.name for value in self.session.get_inputs()]


def peer(python: Path, script: str, job: Path, out: Path, *, reuse: bool) -> dict[str, Any]:
    """What a peer made in its own environment. SystemExit with its words where its script ends with an error."""
    if not (reuse and (out / "result.json").is_file()):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OLIVE_DISABLE_TELEMETRY": "1"}
        environment.pop("PYTHONPATH", None)
        command = [str(python.absolute()), str(HERE / script), str(job.resolve()), str(out.resolve())]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=out)
        (out / "log.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
        if done.returncode != 0:
            sys.exit(f"{script} failed:\n{(done.stderr or done.stdout)[-2000:]}")
    found: dict[str, Any] = json.loads((out / "result.json").read_text(encoding="utf-8"))
    return found


def ours(model: str, precision: str, folder: Path, job: Path, threads: int) -> None:
    """Our export, as `edgedistill export` makes it, from the same checkpoint and calibration data."""
    given = json.loads((job / "job.json").read_text(encoding="utf-8"))
    static = precision == "INT8"
    if model == "minilm":
        options = ExportOptions(
            calibration=tuple((text,) for text in given["texts"]) if static else None, compare_speed=False,
            calibration_source="SST-2, training part" if static else "", calibration_samples=CALIBRATION,
        )  # fmt: skip
        export_encoder(Path(given["classifier"]), folder, quantization=precision, threads=threads, options=options)
    else:
        pictures = [{"image": image[None]} for image in np.load(job / "images.npy")]
        export_module(
            resnet56(DATA), (torch.zeros(2, 3, 32, 32),), folder, input_names=["image"], output_names=["logits"],
            quantization=precision, batches=pictures, threads=threads, options=ExportOptions(compare_speed=False),
        )  # fmt: skip


def score(contender: Contender, task: Task, *, reuse: bool) -> None:
    """Which held-out inputs it answers rightly: kept beside the graph, for a run that reuses it."""
    kept = contender.graph.with_suffix(".correct.npy")
    if reuse and kept.is_file() and kept.stat().st_mtime > contender.graph.stat().st_mtime:
        contender.correct = np.load(kept)
        if len(contender.correct) == len(task.labels):
            return
    logits = np.concatenate([contender.run(feed) for feed in task.held_out])
    contender.correct = logits.argmax(-1) == task.labels
    np.save(kept, contender.correct)


def race(contenders: Sequence[Contender], feeds: Sequence[Feed], rounds: int, inputs: int, threads: int) -> None:
    """Seconds of each contender for each round's inputs; all in turn, so that what disturbs one disturbs all."""
    # One thread: onnxruntime computes in the one that calls it.
    clock = time.thread_time if threads == 1 else time.perf_counter
    for number in range(-1, rounds):  # the first one warms up
        if number > 0 and number % REOPEN == 0:
            for contender in contenders:
                contender.open(threads)
                for feed in feeds[:WARM]:
                    contender.run(feed)
        chosen = [feeds[(number * inputs + index) % len(feeds)] for index in range(inputs)]
        shift = number % len(contenders)
        for contender in [*contenders[shift:], *contenders[:shift]]:
            contender.run(chosen[-1])  # brings its weights back into the caches
            started, wall = clock(), time.perf_counter()
            for feed in chosen:
                contender.run(feed)
            if number >= 0:
                contender.seconds.append(clock() - started)
                contender.wall_seconds.append(time.perf_counter() - wall)


def difference(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> Ratio:
    """Accuracy of `one` minus that of `other`, with the paired 95 % interval."""
    each = one.astype(np.int8) - other.astype(np.int8)
    ones = np.ones(len(each))
    found = statistics.difference(ByUnit(one.astype(float), ones), ByUnit(other.astype(float), ones))
    return Ratio(found.value, *(found.ci95 or (float("-inf"), float("inf"))), len(each))


def compare(
    title: str, mine: Contender, peers: Sequence[Contender], floats: Mapping[str, NDArray[np.bool_]], inputs: int
) -> tuple[dict[str, Any], list[tuple[str, ...]], list[Bound]]:
    """Figures, rows and bounds of one model and precision. `floats`: the peers' own float answers, by peer."""
    figures: dict[str, Any] = {}
    rows: list[tuple[str, ...]] = []
    kept = []
    for contender in (mine, *peers):
        ratio = paired(mine.seconds, contender.seconds)
        apart = difference(mine.correct, contender.correct)
        lost = difference(contender.correct, floats[contender.name.split(":")[0]])
        if contender is not mine and lost.high >= KEPT:
            kept.append((contender, ratio, apart))
        milliseconds = 1000 * float(np.median(contender.seconds)) / inputs
        figures[contender.name] = {
            "bytes": contender.bytes, "accuracy": contender.accuracy, "latency_ms": milliseconds,
            "wall_ms": 1000 * float(np.median(contender.wall_seconds)) / inputs,
            "latency_ours_over_it": asdict(ratio), "accuracy_ours_minus_it": asdict(apart),
            "accuracy_minus_its_float": asdict(lost),
        }  # fmt: skip
        shown = "" if contender is mine else str(ratio)
        apart_shown = "" if contender is mine else f"{apart.value:+.2%} [{apart.low:+.2%}, {apart.high:+.2%}]"
        rows.append((title, contender.name, human_bytes(contender.bytes), f"{contender.accuracy:.2%}", apart_shown,
                     f"{milliseconds:.3f}", shown))  # fmt: skip
    if not kept:
        return figures, rows, []
    fastest, ratio, _ = max(kept, key=lambda found: found[1].value)
    smallest = min((found[0] for found in kept), key=lambda found: found.bytes)
    most, _, apart = min(kept, key=lambda found: found[2].high)
    return figures, rows, [
        Bound(f"{title}: latency, ours ÷ {fastest.name}, upper 95 %", ratio.high, "<=", LATENCY),
        Bound(f"{title}: bytes, ours ÷ {smallest.name}", mine.bytes / smallest.bytes, "<=", SIZE),
        Bound(f"{title}: accuracy, ours − {most.name}, upper 95 %", apart.high, ">=", 0.0),
    ]  # fmt: skip


def main() -> None:
    asked = parser(__doc__)
    asked.add_argument(
        "--optimum-python", type=Path, required=True, help="interpreter of an environment with optimum-onnx"
    )
    asked.add_argument("--olive-python", type=Path, required=True, help="interpreter of an environment with olive-ai")
    asked.add_argument("--models", default=",".join(MODELS))
    asked.add_argument("--precisions", default=",".join(PRECISIONS))
    asked.add_argument("--threads", type=int, default=1)
    asked.add_argument("--rounds", type=int, default=40)
    asked.add_argument("--inputs", type=int, default=4, help="timed in a round")
    asked.add_argument("--held-out", type=int, default=1000, help="at most so many sentences and images are scored")
    asked.add_argument("--work", type=Path, default=Path("build/onnx_peers"), help="where the models are kept")
    asked.add_argument("--reuse", action="store_true", help="take the models that are there")
    arguments = asked.parse_args()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    work, threads = arguments.work, arguments.threads
    job = work / "job"
    if not (arguments.reuse and (job / "job.json").is_file()):
        write_job(DATA, job, classifier(DATA, work / "classifier"))
    made = {
        "optimum": peer(
            arguments.optimum_python, "onnx_peers_optimum.py", job, work / "optimum", reuse=arguments.reuse
        ),
        "olive": peer(arguments.olive_python, "onnx_peers_olive.py", job, work / "olive", reuse=arguments.reuse),
    }
    figures: dict[str, Any] = {"threads": threads, "rounds": arguments.rounds, "inputs_a_round": arguments.inputs,
                               "peers": {name: {k: found[k] for k in ("versions", "failed")} for name, found in made.items()}}  # fmt: skip
    rows: list[tuple[str, ...]] = []
    bounds: list[Bound] = []
    for model in arguments.models.split(","):
        task = text_task(DATA, work / "classifier", 64) if model == "minilm" else image_task(DATA, 64)
        count = arguments.held_out
        task = Task(task.held_out[:count], task.labels[:count], task.timed)
        floats: dict[str, NDArray[np.bool_]] = {}
        for precision in arguments.precisions.split(","):
            folder = work / "ours" / f"{model}-{precision}"
            if not arguments.reuse:
                shutil.rmtree(folder, ignore_errors=True)
            if not (folder / "model.onnx").is_file():
                ours(model, precision, folder, job, threads)
            mine = Contender("ours", folder / "model.onnx")
            theirs = [
                Contender(f"{name}: {key.split('/')[2]}", work / name / path)
                for name, found in made.items() for key, path in found["made"].items()
                if key.startswith(f"{model}/{precision}/")
            ]  # fmt: skip
            for contender in (mine, *theirs):
                contender.open(threads)
                score(contender, task, reuse=arguments.reuse)
                if precision == "FP32":
                    floats.setdefault(contender.name.split(":")[0], contender.correct)
            race([mine, *theirs], task.timed, arguments.rounds, arguments.inputs, threads)
            title = f"{model} {precision}"
            figures[title], more, claims = compare(title, mine, theirs, floats, arguments.inputs)
            rows += more
            bounds += claims
    notes = [
        f"{name} could not make {key}: {why}" for name, found in made.items() for key, why in found["failed"].items()
    ]
    finish(
        "onnx_peers", arguments, figures=figures, rows=rows, bounds=bounds, notes=notes,
        header=("model", "contender", "size", "accuracy", "ours − it", "ms", "latency, ours ÷ it"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
