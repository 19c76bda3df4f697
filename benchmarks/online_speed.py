"""Seconds of a step of online updates, by phase, against TRL's RLOOTrainer: same model, batch, lengths. Prints JSON.

A step draws 64 responses (8 to each of 8 queries), rewards them by a function, and makes one update with a KL penalty
against the reference and a leave-one-out baseline (`oirl tune ppo`, baseline leave_one_out; TRL's RLOO). `apa` is the
same with oirl's defaults: a value network of its own, two epochs of two updates, which TRL has nothing beside. Weights
are random, so that nearly all responses have `--max-tokens` tokens. Runs alternate, each in a process of its own;
medians over steps after the first ones, ratios are oirl over TRL. TRL has dropped its PPO: with `--old-trl PYTHON`, an
interpreter with trl 0.11.4 (transformers 4.45.2, numpy below 2), its `step` runs beside `oirl tune ppo` with a value
head: 64 responses, four epochs of two updates.

Run: OMP_NUM_THREADS=1 python benchmarks/online_speed.py [--shape small|medium|0.5b] [--steps 12] [--repeats 3] [--bf16]
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import common  # noqa: F401  (puts oirl on the path)
from tuning_speed import SHAPES

from oirl_data import small_lm_path

SYSTEMS = ("oirl", "trl", "apa", "ppo", "old_trl")
SKIPPED = 3


def make_folder(shape: str, folder: Path) -> str:
    """Write a model with random weights and the small model's tokenizer, and return its folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen2Config

    torch.manual_seed(0)
    ends = {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0, "max_position_embeddings": 2048}
    if shape == "small":
        config = AutoConfig.from_pretrained(small_lm_path())
    else:
        config = (Qwen2Config if shape == "0.5b" else LlamaConfig)(**SHAPES[shape], **ends)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for file in small_lm_path().glob("tokenizer*"):
        shutil.copy(file, folder)
    return str(folder)


def words(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """Reward length: cheap, and of several values."""
    return [float(len(text)) / 100 for text in completions]


def run_oirl(args: argparse.Namespace, folder: Path, model: str) -> dict[str, Any]:
    """Return seconds of the steps, by phase, of oirl."""
    import oirl

    rows = [json.dumps({"query": f"Anna has {i % 50} apples and {i // 50} books. How many?"}) for i in range(400)]
    (folder / "queries.jsonl").write_text("\n".join(rows))
    settings: dict[str, Any] = {
        "model": model, "out": str(folder / "run"), "queries": str(folder / "queries.jsonl"), "held_out": 0.0,
        "reward": "online_speed:words", "keep": "last", "iterations": args.steps, "rollouts": 64,
        "max_tokens": args.max_tokens, "micro_batch": args.micro_batch, "save_every": 10_000, "learning_rate": 1e-5,
    }  # fmt: skip
    if args.bf16:
        settings["bf16"] = True
    if args.system == "oirl":
        one_update = {"samples": 8, "epochs": 1, "batch": 64, "baseline": "leave_one_out", "value_clip": None}
        oirl.tune("ppo", settings | one_update | {"kl_controller": "fixed"})
    elif args.system == "ppo":
        oirl.tune("ppo", settings | {"baseline": "value_head", "batch": 32, "epochs": 4})
    else:
        oirl.tune("apa", settings)
    told = [json.loads(line) for line in (folder / "run" / "times.jsonl").read_text().splitlines()][SKIPPED:]
    phases = [name for name in told[0] if name.startswith("seconds_")]
    found = {name: statistics.median(row[name] for row in told) for name in phases}
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    tokens = [row["tokens"] for row in lines if row["kind"] == "rollouts"][SKIPPED:]
    return {"seconds": [sum(row[p] for p in phases) for row in told], "tokens": tokens, "phases": found}


def run_trl(args: argparse.Namespace, folder: Path, model: str) -> dict[str, Any]:
    """Return seconds of the steps of TRL."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import RLOOConfig, RLOOTrainer

    ends: list[float] = []
    tokens: list[int] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    def reward(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
        tokens.append(sum(map(len, completion_ids)))
        return words(prompts, completions)

    config = RLOOConfig(
        output_dir=str(folder), per_device_train_batch_size=args.micro_batch,
        gradient_accumulation_steps=64 // args.micro_batch, num_generations=8, max_completion_length=args.max_tokens,
        beta=0.05, max_steps=args.steps, learning_rate=1e-5, lr_scheduler_type="constant", logging_steps=10_000,
        save_strategy="no", report_to="none", disable_tqdm=True, bf16=args.bf16, gradient_checkpointing=False,
        model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    data = Dataset.from_list(
        [{"prompt": f"Anna has {i % 50} apples and {i // 50} books. How many?"} for i in range(400)]
    )
    trainer = RLOOTrainer(model=model, reward_funcs=reward, args=config, train_dataset=data, callbacks=[Clock()])
    trainer.train()
    seconds = [b - a for a, b in pairwise(ends)]
    return {"seconds": seconds[SKIPPED - 1 :], "tokens": tokens[SKIPPED:], "phases": {}}


def run_old_trl(args: argparse.Namespace, folder: Path, model: str) -> dict[str, Any]:
    """Return seconds of the steps of TRL's former PPO; nothing of oirl is needed for it."""
    import torch
    from transformers import LlamaTokenizerFast
    from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

    torch.manual_seed(0)
    config = PPOConfig(
        batch_size=64, mini_batch_size=32, ppo_epochs=4, learning_rate=1e-5, init_kl_coef=0.05, log_with=None
    )  # fmt: skip
    policy, reference = (AutoModelForCausalLMWithValueHead.from_pretrained(model) for _ in range(2))
    tokenizer = LlamaTokenizerFast(tokenizer_file=str(small_lm_path() / "tokenizer.json"), pad_token="<pad>")
    tokenizer.pad_token_id, tokenizer.eos_token_id = 0, 2
    trainer = PPOTrainer(config, policy, reference, tokenizer)
    seconds, tokens = [], []
    for step in range(args.steps):
        began = time.perf_counter()
        queries = [torch.randint(4, 250, (12,)) for _ in range(64)]
        responses = trainer.generate(
            queries, batch_size=64, return_prompt=False, do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
            max_new_tokens=args.max_tokens, pad_token_id=0, eos_token_id=2,
        )  # fmt: skip
        trainer.step(queries, responses, [torch.tensor(float(len(r) + step % 3)) for r in responses])
        seconds.append(time.perf_counter() - began)
        tokens.append(sum(map(len, responses)))
    return {"seconds": seconds[SKIPPED:], "tokens": tokens[SKIPPED:], "phases": {}}


def child(args: argparse.Namespace) -> None:
    """Run one system in this process and print its figures."""
    import torch

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_folder(args.shape, folder / "model")
        run = {"trl": run_trl, "old_trl": run_old_trl}.get(args.system, run_oirl)
        found = run(args, folder, model)
    gpu = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() / 1e6 if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(found | {"peak_mb": peak, "device": torch.cuda.get_device_name() if gpu else "cpu"}))


def main() -> None:
    """Run all systems in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["small", *SHAPES], default="small")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--micro-batch", type=int, default=32)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--old-trl", help="an interpreter that has trl 0.11.4")
    parser.add_argument("--system", choices=SYSTEMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.system:
        child(args)
        return
    systems = SYSTEMS if args.old_trl else SYSTEMS[:-1]
    runs: dict[str, list[dict[str, Any]]] = {system: [] for system in systems}
    for _ in range(args.repeats):
        for system in systems:
            python = args.old_trl if system == "old_trl" else sys.executable
            command = [python, __file__, *sys.argv[1:], "--system", system]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr)
            runs[system].append(json.loads(done.stdout.splitlines()[-1]))
            print(system, round(statistics.median(runs[system][-1]["seconds"]), 3), file=sys.stderr)
    found: dict[str, Any] = {"settings": {k: v for k, v in vars(args).items() if k != "system"}}
    for system, some in runs.items():
        seconds = [statistics.median(run["seconds"]) for run in some]
        phases = {p: round(statistics.median(run["phases"][p] for run in some), 4) for p in some[0]["phases"]}
        tokens = statistics.median(token for run in some for token in run["tokens"])
        found[system] = {
            "seconds_a_step": round(statistics.median(seconds), 4),
            "seconds_a_step_of_runs": [round(value, 4) for value in seconds],
            "response_tokens_a_step": tokens,
            "response_tokens_per_s": round(tokens / statistics.median(seconds)),
            "peak_mb": round(statistics.median(run["peak_mb"] for run in some)),
            "device": some[0]["device"],
            **phases,
        }
    for ours, theirs in (("oirl", "trl"), ("ppo", "old_trl")):
        if theirs in found:
            pairs = zip(*(found[name]["seconds_a_step_of_runs"] for name in (theirs, ours)), strict=True)
            found[f"{ours} / {theirs}, steps a second"] = [round(a / b, 3) for a, b in pairs]
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
