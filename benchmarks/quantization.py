"""What quantizing costs, what an importance matrix is worth, and what quantization-aware distillation wins back.

Two students: one distilled from teacher-tinystories-21m, and the quickstart's. All files run in the runtimes that ship.
  types       per type, by the product's defaults: perplexity, mean and p99 KL from the F16 file, bits per weight, size,
              decode speed (one thread, all types in turn in every round)
  importance  KL with an importance matrix over KL without it, paired; `auto` must not contradict an interval
  qad         three seeds: extra tokens under the artifact's rounding against the same tokens without, then quantized

Claims: with at most 10 % of the distillation's tokens, quantization-aware distillation at least halves the mean KL from the
F16 control for Q4_0, Q3_K_M, Q2_K and INT4, at the upper end of the paired 95 % interval (over documents).
Results of a stage stay in the store that EDGEDISTILL_STORE names: an interrupted run goes on where it was.
"""

from __future__ import annotations

from typing import Any

import torch
from common import Bound, finish, parser
from quantization_qad import qad_table
from quantization_setup import subject
from quantization_types import importance_table, types_table

from edgedistill.cli.show import table
from edgedistill.progress import Progress
from edgedistill.store import Store

STAGES = ("types", "importance", "qad")
HEADERS = {
    "types": ("student", "artifact", "perplexity", "mean KL", "p99 KL", "bits", "size", "tokens/s"),
    "importance": ("type", "student", "KL with", "without", "ratio", "shows", "default"),
    "qad": ("artifact", "seed", "KL aware", "KL control", "ratio"),
}


def main() -> None:
    asked = parser(__doc__)
    asked.add_argument("--only", choices=STAGES, nargs="+", default=list(STAGES))
    asked.add_argument(
        "--students", choices=("tinystories", "quickstart"), nargs="+", default=["tinystories", "quickstart"]
    )
    asked.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    asked.add_argument("--max-tokens", type=int, default=16_000, help="held-out tokens to score, whole documents")
    asked.add_argument("--rounds", type=int, default=7, help="of the decode speed")
    arguments = asked.parse_args()
    torch.manual_seed(0)
    store, progress = Store(), Progress()
    subjects = [subject(n, store=store, max_tokens=arguments.max_tokens, progress=progress) for n in arguments.students]
    figures: dict[str, Any] = {}
    rows: dict[str, list[tuple[str, ...]]] = {}
    bounds: list[Bound] = []
    notes = []
    for stage in arguments.only:
        if stage == "types":
            made = types_table(subjects, store=store, rounds=arguments.rounds, progress=progress)
        elif stage == "importance":
            made = importance_table(subjects, store=store, progress=progress)
        else:
            of = next((s for s in subjects if s.name == "tinystories"), subjects[0])
            made = qad_table(of, arguments.seeds, store=store, progress=progress)
            notes.append(f"qad: on the {of.name} student")
        figures[stage], rows[stage] = made[0], made[1]
        bounds += made[2]
    last = arguments.only[-1]
    if not arguments.json:
        for stage in arguments.only[:-1]:
            print(table(stage, HEADERS[stage], rows[stage]))
    for of in subjects:
        figures.setdefault("students", {})[of.name] = {
            "parameters": of.trained.student.result.parameters, "tokens": of.distilled_tokens,
            "documents": of.windows[-1].document + 1, "tokens_scored": sum(w.scored for w in of.windows),
        }  # fmt: skip
    finish(
        "quantization", arguments, figures=figures, header=HEADERS[last], rows=rows[last], bounds=bounds, notes=notes
    )


if __name__ == "__main__":
    main()
