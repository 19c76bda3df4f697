"""Speed and memory of supervised updates against TRL's SFTTrainer: same model, examples and settings. Prints JSON.

Both learn the same tokens of the same responses with AdamW, the same batch and gradient accumulation. Runs alternate,
each in a process of its own, and medians are shown; ratios are oirl over TRL. `tokens_per_s` counts tokens that are no
padding; `peak_mb` is the process's peak memory beyond what it has before training (on a GPU the peak that is
allocated there). `flops_share` is 6 · parameters · tokens/s over --peak-tflops.

Run: python benchmarks/tuning_speed.py [--shape small|medium|0.5b] [--examples 2000] [--repeats 3] [--bf16]
(`small` is the demo's language model; `medium` a Llama of 17 million parameters with a vocabulary of 32,000; `0.5b` has
the shape of Qwen2-0.5B: for GPUs.)
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

from oirl_data import small_lm_path

SYSTEMS = ("oirl", "trl")
SHAPES: dict[str, dict[str, Any]] = {
    "medium": {"vocab_size": 32_000, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
               "num_attention_heads": 4, "tie_word_embeddings": True},
    "0.5b": {"vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
             "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True},
}  # fmt: skip


def make_model(shape: str) -> Any:
    """Return the model: the demo's, or one with random weights."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    if shape == "small":
        return AutoModelForCausalLM.from_pretrained(small_lm_path(), dtype=torch.float32)
    kind = (Qwen2Config, Qwen2ForCausalLM) if shape == "0.5b" else (LlamaConfig, LlamaForCausalLM)
    return kind[1](kind[0](max_position_embeddings=2048, **SHAPES[shape]))


def make_examples(n: int, vocabulary: int, longest: int) -> list[tuple[list[int], list[int]]]:
    """Return (context, response) tokens, of lengths as they are in logs: most short, some long."""
    rng = random.Random(0)

    def tokens(mean: float) -> list[int]:
        return [rng.randrange(4, vocabulary) for _ in range(min(max(int(rng.lognormvariate(mean, 0.6)), 2), longest))]

    scale = 3.0 if longest < 100 else 4.2
    return [(tokens(scale), tokens(scale)) for _ in range(n)]


def run_oirl(model: Any, examples: list[Any], args: argparse.Namespace, folder: Path) -> None:
    """Train with oirl's trainer."""
    from oirl.tuning.configuring import make_settings
    from oirl.tuning.examples import Example
    from oirl.tuning.trainer import Objective, UpdateTrainer

    sizes = {"batch": args.batch, "micro_batch": args.micro_batch, "bf16": args.bf16, "save_every": 100_000}
    entries = {"model": "m", "out": str(folder), "log": "l", "schedule": "constant", "warmup": 0.0, **sizes}
    trainer = UpdateTrainer(
        model,
        [Example(context, response) for context, response in examples],
        Objective(),
        make_settings("sft", entries | {"learning_rate": 1e-4}),
        folder,
        seed=0,
        fill=0,
        emit=lambda *_: None,
        evaluate=lambda _: None,
    )
    measure(trainer, examples, args, model)


def run_trl(model: Any, examples: list[Any], args: argparse.Namespace, folder: Path) -> None:
    """Train with TRL's SFTTrainer, the loss on responses only."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    rows = [
        {"input_ids": context + response, "completion_mask": [0] * len(context) + [1] * len(response)}
        for context, response in examples
    ]
    config = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=args.micro_batch,
        gradient_accumulation_steps=args.batch // args.micro_batch,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        num_train_epochs=1,
        completion_only_loss=True,
        max_length=None,
        bf16=args.bf16,
        gradient_checkpointing=False,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **({"train_sampling_strategy": "group_by_length"} if args.trl_grouped else {}),
    )
    tokenizer = AutoTokenizer.from_pretrained(small_lm_path())
    trainer = SFTTrainer(model, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    measure(trainer, examples, args, model)


def memory() -> float:
    """Return the highest memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(trainer: Any, examples: list[Any], args: argparse.Namespace, model: Any) -> None:
    """Train, and print the figures."""
    import torch

    gpu = torch.cuda.is_available()
    before = memory()
    began = time.perf_counter()
    trainer.train()
    if gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    peak = (
        torch.cuda.max_memory_allocated() / 2**20
        if gpu
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
    )
    tokens = sum(len(c) + len(r) for c, r in examples)
    found = {"seconds": seconds, "tokens_per_s": tokens / seconds, "peak_mb": peak}
    if args.peak_tflops:
        parameters = sum(p.numel() for p in model.parameters())
        found["flops_share"] = 6 * parameters * tokens / seconds / (args.peak_tflops * 1e12)
    print(json.dumps(found))


def main() -> None:
    """Run both systems in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["small", *SHAPES], default="small")
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--peak-tflops", type=float, default=0.0, help="of the device, for the share of its peak")
    parser.add_argument("--trl-grouped", action="store_true", help="have TRL group rows by length too")
    parser.add_argument("--system", choices=SYSTEMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.system:
        model = make_model(args.shape)
        longest = 60 if args.shape == "small" else 500
        examples = make_examples(args.examples, model.config.vocab_size, longest)
        with tempfile.TemporaryDirectory() as folder:
            (run_oirl if args.system == "oirl" else run_trl)(model, examples, args, Path(folder))
        return
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in SYSTEMS}
    for _ in range(args.repeats):
        for name in SYSTEMS:
            command = [sys.executable, __file__, *sys.argv[1:], "--system", name]
            done = subprocess.run(command, env=common.cpu_environment(), capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            figures[name].append(json.loads(done.stdout.strip().splitlines()[-1]))
    medians = {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for name, rows in figures.items()
    }
    ratios = {key: medians["oirl"][key] / medians["trl"][key] for key in ("tokens_per_s", "peak_mb")}
    settings = {k: v for k, v in vars(args).items() if k != "system"}
    print(json.dumps({"settings": settings, "medians": medians, "oirl_over_trl": ratios}, indent=2))


if __name__ == "__main__":
    main()
