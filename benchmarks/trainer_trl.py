"""TRL's side of benchmarks/trainer.py, run in TRL's environment: python trainer_trl.py KIND JOB OUT.

KIND is "gkd" (trl.experimental.gkd.GKDTrainer with lmbda=0, beta=0: off-policy forward KL over full logits) or
"distillation" (trl.DistillationTrainer with beta=0: forward KL in chunks). What it takes to give both the same work as ours:

- Token ids come ready, in order: GKD through a collator of our own and sequential sampling; DistillationTrainer, which knows
  on-policy training alone, through `_generate` giving the text instead of the student's samples: the first token of a row is
  the prompt, the rest the completion. Nothing is generated.
- Of a row's context + 1 tokens both run all through the models and leave the last position out of the loss; ours runs
  `context`. The loss counts the same `context` targets of each row, normalised by their number in the batch.
- The optimizer is handed over: fused AdamW with our groups (TRL would decay embeddings too) and our schedule.
- TRL's defaults otherwise, but: no gradient checkpointing (on by default, slower), nothing saved or reported.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def reset_peak() -> int:
    """Start the resident set's high-water mark (VmHWM, Linux) again from here; the resident bytes now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return _status("VmRSS")


def peak_bytes() -> int:
    """The high-water mark of the resident set since `reset_peak`."""
    return _status("VmHWM")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}: this benchmark measures memory on Linux")


def main() -> None:
    kind, job_folder, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    job: dict[str, Any] = json.loads((job_folder / "job.json").read_text(encoding="utf-8"))
    import numpy as np
    import torch
    import transformers
    import trl
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback

    torch.set_num_threads(job["threads"])
    cuda = job["device"] == "cuda"
    # token ids come ready: a tokenizer is asked for by TRL, which reads its padding token alone
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<end>": 0}, unk_token="<end>")), eos_token="<end>", pad_token="<end>"
    )
    tokenizer.padding_side = "left"
    seen: dict[str, Any] = {"losses": []}
    common: dict[str, Any] = {
        "output_dir": str(out / "trl"), "max_steps": job["steps"], "per_device_train_batch_size": job["micro_batch"],
        "gradient_accumulation_steps": job["batch"] // job["micro_batch"], "max_grad_norm": job["clip_norm"],
        "bf16": job["bf16"], "use_cpu": not cuda, "gradient_checkpointing": False, "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "beta": 0.0, "temperature": 1.0,
    }  # fmt: skip
    if kind == "gkd":
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        trainer_class: Any = GKDTrainer
        settings = GKDConfig(**common, lmbda=0.0, train_sampling_strategy="sequential")
    elif kind == "distillation":
        from trl import DistillationConfig, DistillationTrainer

        class OffPolicy(DistillationTrainer):  # type: ignore[misc, valid-type]
            """The text's own tokens stand where the student's samples would."""

            def _generate(self, prompts: list[list[int]]) -> tuple[Any, ...]:
                return [row[:1] for row in prompts], [row[1:] for row in prompts], None, None, []

        trainer_class = OffPolicy
        settings = DistillationConfig(**common, shuffle_dataset=False)
    else:
        sys.exit(f"{kind!r} is neither gkd nor distillation")

    class Clock(TrainerCallback):  # type: ignore[misc, valid-type]
        """From the first step's beginning to the last step's end, as ours is timed."""

        def on_step_begin(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            if state.global_step == job["uncounted"]:
                seen["started"] = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if cuda:
                torch.cuda.synchronize()
            seen["ended"] = time.perf_counter()

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                seen["losses"].append(logs["loss"])

    def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
        ids = torch.tensor([example["ids"] for example in examples])
        labels = ids.clone()
        labels[:, 0] = -100  # never a target; older transformers count it as one
        return {
            "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels,
            "prompts": ids[:, :1], "prompt_attention_mask": torch.ones_like(ids[:, :1]),
        }  # fmt: skip

    rows = np.load(job_folder / "rows.npy").tolist()
    before = reset_peak()
    student: Any = AutoModelForCausalLM.from_pretrained(job_folder / "student", dtype=torch.float32)
    teacher: Any = AutoModelForCausalLM.from_pretrained(job["teacher"], dtype=torch.bfloat16 if cuda else torch.float32)
    if cuda:
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats()
    named = dict(student.named_parameters())
    decayed = set(job["decayed"])
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in named.items() if n in decayed], "weight_decay": job["weight_decay"]},
            {"params": [p for n, p in named.items() if n not in decayed], "weight_decay": 0.0},
        ],
        lr=job["learning_rate"], betas=tuple(job["betas"]), fused=True,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: [*job["rates"], 0.0][step])
    if cuda:
        student.to("cuda")  # in place: the optimizer keeps its parameters
    arguments: dict[str, Any] = {
        "model": student, "teacher_model": teacher, "args": settings, "processing_class": tokenizer,
        "train_dataset": Dataset.from_dict({"ids" if kind == "gkd" else "prompt": rows}),
        "optimizers": (optimizer, schedule), "callbacks": [Clock()],
    }  # fmt: skip
    if kind == "gkd":
        arguments["data_collator"] = collate
    trainer = trainer_class(**arguments)
    trainer.train()
    peak = torch.cuda.max_memory_allocated() if cuda else peak_bytes() - before
    student.save_pretrained(out / "student")
    seconds = seen["ended"] - seen["started"]
    tokens = (job["steps"] - job["uncounted"]) * job["batch"] * job["context"]
    result = {
        "contender": f"trl {trl.__version__} {trainer_class.__mro__[kind == 'distillation'].__name__}",
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "peak_bytes": peak,
        "losses": seen["losses"],
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, trl)},
    }
    (out / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
