"""The trainer's speed: against the barest PyTorch loop, and against TRL's trainers on the same work.

Teacher: teacher-tinystories-21m (EDGEDISTILL_TEST_DATA), live, fp32 weights under bf16 autocast as the student's; student:
4.2M parameters, fresh, one start for all; text: the excerpt's training part in packed sequences; forward KL at T = 1.

bare   One process, contenders in turn, the order rotated each round: ours (`trainer.train`, TensorBoard on, default settings),
       the barest loop doing the same arithmetic, and a bare loop with all logits, as people write it. Tokens/s from first
       step to last. Ours counts its logging, checks and progress; not evaluation and checkpoints, whose seconds are apart.
trl    A process each, in turn: ours, TRL's GKDTrainer (off-policy) and its DistillationTrainer (chunked loss; given the text in
       place of the student's samples), see trainer_trl.py for what that took. Round 1 is long and gives the weights whose
       held-out KL to the teacher one evaluator measures here (fp32); shorter rounds add to the speed. Memory: VmHWM minus
       what stood after imports. Ours evaluates on the way and keeps its best weights, checkpoints as by default.

    pip install 'torch>=2.11,<2.14' trl     # in an environment of its own
    python benchmarks/trainer.py --trl-python ENVIRONMENT/bin/python --check --save

Claims: >= 0.95x the barest loop; faster than each of TRL's, with less peak memory, and a held-out KL that is lower or equal: at
most 0.1 % above. All do the same arithmetic in another order, so that the weights differ by rounding; the paired interval of
the difference over held-out documents is in the result, and being paired it need not reach zero.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Bound, as_list, finish, parser
from trainer_setup import (
    Ratio,
    bare_loop,
    full_logits_loss,
    fused_loss,
    our_loop,
    paired,
    run_trl,
    run_worker,
    write_job,
)
from trainer_trl import peak_bytes, reset_peak
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from edgedistill.cli.show import human_bytes
from edgedistill.config.recipe import Data, Student, Training
from edgedistill.data.prepare import prepare_data, read_part
from edgedistill.models.folder import check_folder
from edgedistill.statistics import by_unit, positive_mean, ratio_of_means
from edgedistill.store import Store
from edgedistill.student.design import design_student
from edgedistill.student.start import start_student
from edgedistill.tasks.causal_lm import Packed, encode_blocks, groups, scoring_windows
from edgedistill.training.text import Text, training_text

DATA = Path(os.environ.get("EDGEDISTILL_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
TEACHER = DATA / "weights" / "teacher-tinystories-21m"
TEXT = DATA / "text_lm" / "tinystories" / "tinystories_lowercase_4MB.txt"
COMPRESSION = 4.6
EVALUATION_TOKENS = 8192  # of the calibration part, on which ours evaluates while it trains
HELD_OUT_TOKENS = 30_000
TRL_KINDS = ("gkd", "distillation")


def settings_for(steps: int, batch: int, context: int) -> Training:
    return Training(tokens=steps * batch * context, context_tokens=context, batch_sequences=batch)


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)


def text_for(settings: Training) -> tuple[Text, list[list[str]]]:
    stored = prepare_data(Data(source=str(TEXT), split="tail"), store=Store())
    return training_text(TEACHER, stored, settings, seed=0), read_part(stored.directory, "held_out")


def start() -> Any:
    source = check_folder(TEACHER, name=str(TEACHER), origin="folder", role="teacher")
    shape = design_student(source.shape, compression=COMPRESSION, width_multiple=64)
    return start_student(Student(start="fresh"), shape, teacher=TEACHER, pretrained=None, seed=0)[0]


def against_bare(student: Any, teacher: Any, text: Text, rounds: int, steps: int, batch: int) -> dict[str, Any]:
    """Tokens/s of the three contenders, round by round."""
    settings = settings_for(steps, batch, text.packed.context).model_copy(update={"evaluate_every_share": 1.0})
    vocab = text.tokenizer.vocab
    names = ["ours", "bare", "bare, full logits"]
    speed: dict[str, list[float]] = {name: [] for name in names}
    last: dict[str, float] = {}
    for number in range(-1, rounds):  # the first one warms up
        for name in names[number % 3 :] + names[: number % 3]:
            model = copy.deepcopy(student)
            if name == "ours":
                with tempfile.TemporaryDirectory(prefix="edgedistill-trainer-") as state:
                    result, spent = our_loop(model, teacher, text.packed, settings, vocab, Path(state))
                seconds, loss = result.seconds - sum(spent.values()), result.history[-1]["loss"]
            else:
                loss_of = fused_loss if name == "bare" else full_logits_loss
                seconds, loss = bare_loop(model, teacher, text.packed, settings, steps, vocab, loss_of)
            if number >= 0:
                speed[name].append(steps * batch * text.packed.context / seconds)
            last[name] = loss
    if abs(last["ours"] - last["bare"]) > 1e-3 * last["bare"]:
        sys.exit(f"the loops do not do the same: losses {last}")
    return {"tokens_per_s": speed, "last_loss": last, "rounds": rounds, "steps": steps, "batch_sequences": batch}


def worker(job_folder: Path, out: Path) -> None:
    """Ours in a process of its own, on the job that TRL's worker reads."""
    job = json.loads((job_folder / "job.json").read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    rows = np.load(job_folder / "rows.npy")
    windows = np.load(job_folder / "windows.npy", allow_pickle=False)
    from tensorboard.compat.proto import event_pb2  # noqa: F401  imported before memory is counted, as TRL's imports are
    from torch.utils import tensorboard  # noqa: F401

    settings = settings_for(job["steps"], job["batch"], job["context"])
    data = InOrder(stream=rows, context=job["context"], seed=0)
    evaluation = scoring_windows(list(windows), context=job["context"], stride=None, max_tokens=None)
    before = reset_peak()
    student, teacher = load(job_folder / "student"), load(Path(job["teacher"]))
    result, spent = our_loop(student, teacher, data, settings, job["vocab"], out, evaluation)
    peak = peak_bytes() - before
    student.save_pretrained(out / "student")
    seconds = result.seconds - sum(spent.values())
    document = {
        "contender": "edgedistill",
        "seconds": seconds,
        "tokens": result.tokens,
        "tokens_per_s": result.tokens / seconds,
        "seconds_apart": spent,
        "tokens_per_s_whole": result.tokens_per_s,
        "best_step": result.best_step,
        "peak_bytes": peak,
        "losses": [row["loss"] for row in result.history],
    }
    (out / "result.json").write_text(json.dumps(document, indent=1), encoding="utf-8")


class InOrder(Packed):
    """The job's rows [sequences, context + 1], taken from first to last."""

    @property
    def sequences(self) -> int:
        return len(self.stream)

    def order(self, epoch: int) -> Any:
        return np.arange(self.sequences)

    def sequence_ids(self, rows: Any) -> Any:
        return self.stream[rows].astype(np.int64)


def against_trl(
    python: Path, kinds: list[str], student: Any, text: Text, rounds: int, steps: tuple[int, int], batch: int,
    folder: Path,
) -> dict[str, list[dict[str, Any]]]:  # fmt: skip
    """Results of ours and of TRL's trainers, round by round; `steps` of the first round and of the others."""
    names = ["ours", *kinds]
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    enough = [w.ids for w in text.evaluation if len(w.ids) == text.packed.context]
    windows = np.stack(enough[: max(1, EVALUATION_TOKENS // text.packed.context)])
    for number in range(rounds):
        count = steps[0] if number == 0 else steps[1]
        settings = settings_for(count, batch, text.packed.context)
        job = write_job(
            folder / f"job-{count}", student=student, teacher=TEACHER, data=text.packed, settings=settings, steps=count,
            device="cpu", vocab=text.tokenizer.vocab,
        )  # fmt: skip
        np.save(job / "windows.npy", windows)
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            out = folder / f"{name}-{number}"
            out.mkdir()
            if name == "ours":
                command = [sys.executable, __file__, "--worker", str(job), str(out)]
                results[name].append(run_worker(command, out))
            else:
                results[name].append(run_trl(python, name, job, out))
    return results


@torch.no_grad()
def held_out_kl(students: dict[str, Path], teacher: Any, windows: list[Any]) -> dict[str, np.ndarray[Any, Any]]:
    """KL(teacher ‖ student) in nats of every scored token, fp32, full logits; and under "document" whose token it is."""
    models = {name: load(folder).eval() for name, folder in students.items()}
    found: dict[str, list[Any]] = {name: [] for name in [*models, "document"]}
    for group in groups(windows):
        ids = torch.from_numpy(np.stack([w.ids for w in group]).astype(np.int64))[:, :-1]
        log_p = torch.log_softmax(teacher(input_ids=ids).logits, -1)
        for name, model in models.items():
            log_q = torch.log_softmax(model(input_ids=ids).logits, -1)
            kl = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).numpy()
            found[name] += [row[w.first :] for row, w in zip(kl, group, strict=True)]
        found["document"] += [np.full(w.scored, w.document, dtype=np.int64) for w in group]
    return {name: np.concatenate(parts) for name, parts in found.items()}


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        worker(Path(sys.argv[2]), Path(sys.argv[3]))
        return
    asked = parser(__doc__)
    asked.add_argument("--only", default="bare,trl", help="parts, by commas: bare, trl")
    asked.add_argument("--trl-python", type=Path, help="the interpreter of an environment with TRL")
    asked.add_argument("--trl", default=",".join(TRL_KINDS), help="which of TRL's trainers, by commas")
    asked.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked.add_argument("--context", type=int, default=512)
    asked.add_argument("--batch", type=int, default=8, help="sequences a step")
    asked.add_argument("--rounds", type=int, default=9, help="of the bare part")
    asked.add_argument("--steps", type=int, default=4, help="of each round of the bare part")
    asked.add_argument("--trl-rounds", type=int, default=4)
    asked.add_argument("--trl-steps", type=int, nargs=2, default=(40, 12), help="of the first round and of the others")
    arguments = asked.parse_args()
    parts = arguments.only.split(",")
    if set(parts) - {"bare", "trl"}:
        asked.error(f"--only {arguments.only}: parts are bare and trl")
    if "trl" in parts and arguments.trl_python is None:
        asked.error("the trl part needs --trl-python: the interpreter of an environment with TRL")
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    began = time.perf_counter()
    text, held_out = text_for(settings_for(1, arguments.batch, arguments.context))
    student, teacher = start(), load(TEACHER).eval().requires_grad_(False)
    figures: dict[str, Any] = {
        "student_parameters": sum(p.numel() for p in student.parameters()),
        "teacher_parameters": sum(p.numel() for p in teacher.parameters()),
        "context_tokens": arguments.context,
        "threads": arguments.threads,
    }
    rows: list[tuple[str, ...]] = []
    bounds: list[Bound] = []
    notes: list[str] = []
    if "bare" in parts:
        made = against_bare(student, teacher, text, arguments.rounds, arguments.steps, arguments.batch)
        speed = made["tokens_per_s"]
        ratios = {name: paired(speed["ours"], speed[name]) for name in ("bare", "bare, full logits")}
        made["ours_over"] = {name: asdict(ratio) for name, ratio in ratios.items()}
        figures["bare"] = made
        rows.append(("in process: ours", f"{np.median(speed['ours']):,.0f}", "", "", ""))
        for name, ratio in ratios.items():
            rows.append((f"in process: {name}", f"{np.median(speed[name]):,.0f}", str(ratio), "", ""))
        bounds.append(Bound("tokens/s, ours ÷ the barest loop", ratios["bare"].value, ">=", 0.95))
    if "trl" in parts:
        kinds = arguments.trl.split(",")
        with tempfile.TemporaryDirectory(prefix="edgedistill-trl-") as temporary:
            folder = Path(temporary)
            results = against_trl(
                arguments.trl_python, kinds, student, text, arguments.trl_rounds, tuple(arguments.trl_steps),
                arguments.batch, folder,
            )  # fmt: skip
            windows = scoring_windows(
                encode_blocks(text.tokenizer, held_out), context=arguments.context, stride=None,
                max_tokens=HELD_OUT_TOKENS,
            )  # fmt: skip
            kl = held_out_kl({name: folder / f"{name}-0" / "student" for name in results}, teacher, windows)
        document = kl.pop("document")
        sums = {name: by_unit(values, document) for name, values in kl.items()}
        means = {name: positive_mean(of) for name, of in sums.items()}
        figures["trl"] = {
            "results": results, "held_out_tokens": len(document), "held_out_documents": len(np.unique(document)),
            "held_out_kl": {name: as_list(m) for name, m in means.items()},
        }  # fmt: skip
        ours = results["ours"]
        rows.append(_row("ours", ours, None, f"{means['ours'].value:.4f}"))
        for kind in kinds:
            ratio = paired([r["tokens_per_s"] for r in ours], [r["tokens_per_s"] for r in results[kind]])
            memory = max(r["peak_bytes"] for r in ours) / max(r["peak_bytes"] for r in results[kind])
            excess = means["ours"].value / means[kind].value - 1
            ratio_of_kl = ratio_of_means(sums["ours"], sums[kind])
            low, high = (end - 1 for end in ratio_of_kl.ci95 or (float("nan"), float("nan")))
            figures["trl"][f"ours_over_{kind}"] = {
                "tokens_per_s": asdict(ratio), "peak_bytes": memory, "held_out_kl_excess": [excess, low, high],
            }  # fmt: skip
            name = results[kind][0]["contender"]
            shown = f"{means[kind].value:.4f}; ours {excess:+.3%} [{low:+.3%}, {high:+.3%}]"
            rows.append(_row(name, results[kind], ratio, shown))
            bounds += [
                Bound(f"tokens/s, ours ÷ {name}", ratio.value, ">=", 1.0),
                Bound(f"peak memory, ours ÷ {name}", memory, "<=", 1.0),
                Bound(f"held-out KL, ours ÷ {name}", 1 + excess, "<=", 1.001),
            ]  # fmt: skip
        apart = ours[0]["seconds_apart"]
        notes += [
            "ours, seconds apart in the long round: "
            + ", ".join(f"{name} {seconds:.2f}" for name, seconds in apart.items())
            + f"; tokens/s with them {ours[0]['tokens_per_s_whole']:,.0f}",
            f"TRL's versions: {results[kinds[0]][0]['versions']}",
        ]
    figures["seconds"] = round(time.perf_counter() - began, 1)
    notes.append(f"{arguments.threads} threads; {figures['seconds']:.0f} s in all")
    header = ("contender", "tokens/s", "ours ÷ it", "peak memory", "held-out KL (nats a token)")
    finish("trainer", arguments, figures=figures, header=header, rows=rows, bounds=bounds, notes=notes)


def _row(name: str, results: list[dict[str, Any]], ratio: Ratio | None, kl: str) -> tuple[str, ...]:
    speed = f"{np.median([r['tokens_per_s'] for r in results]):,.0f}"
    return name, speed, "" if ratio is None else str(ratio), human_bytes(max(r["peak_bytes"] for r in results)), kl


if __name__ == "__main__":
    main()
