"""Speed of engines on the demo's small language model, and the overhead of collecting a log. Prints JSON.

Tokens a second of every engine that is installed, on the same requests, as a ratio to transformers' own `generate` with
sampling (batches of 32, padded, in the order given) in the same run; and the seconds of `collect` (rendering, grading,
journal, log) over those of the bare engine. Runs alternate, and medians are shown: the machine may be busy.

Run: python benchmarks/engine_speed.py [--requests 2000] [--repeats 3] [--shape 0.5b --dtype bfloat16]
(`--shape 0.5b` makes a model of Qwen2-0.5B's shape with random weights: for GPUs.)
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common  # noqa: F401  (puts oirl on the path)

from oirl.engines.base import Engine, Request, Sampling, derive_seed
from oirl.engines.collecting import collect
from oirl.engines.opening import open_engine
from oirl.records import Query
from oirl_data import small_lm_path
from oirl_data.problems import generate_problems
from oirl_data.prompts import PROMPTS

MAX_TOKENS = 64


def random_model(folder: Path) -> Path:
    """Write a model of the shape of Qwen2-0.5B with random weights and the small model's tokenizer."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(small_lm_path())
    config = Qwen2Config(
        vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=False, eos_token_id=151_935,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.model_max_length = 2048
    tokenizer.save_pretrained(folder)
    return folder


def plain_transformers(model: Path, texts: list[str], dtype: str) -> Callable[[], int]:
    """Return a function that completes the texts with transformers alone and returns the tokens that it sampled."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device).eval()
    config = GenerationConfig(
        do_sample=True, temperature=0.7, top_k=0, max_new_tokens=MAX_TOKENS, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=made.generation_config.eos_token_id,
    )  # fmt: skip

    def run() -> int:
        tokens = 0
        for start in range(0, len(texts), 32):
            batch = tokenizer(texts[start : start + 32], padding=True, padding_side="left", return_tensors="pt")
            ids = batch["input_ids"].to(device)
            mask = batch["attention_mask"].to(device)
            out = made.generate(input_ids=ids, attention_mask=mask, generation_config=config)
            tokens += int((out[:, ids.shape[1] :] != tokenizer.pad_token_id).sum())
        return tokens

    return run


def bare(engine: Engine, requests: list[Request], sampling: Sampling) -> int:
    """Return the tokens that the engine samples, its completions thrown away."""
    return sum(completions[0].tokens_out or 0 for _, completions in engine.stream(requests, sampling))


def measure(ways: dict[str, Callable[[], int]], repeats: int) -> dict[str, dict[str, float]]:
    """Return median seconds and tokens a second of each way, run in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, run in ways.items():
            began = time.perf_counter()
            tokens = run()
            seconds[name].append(time.perf_counter() - began)
            rates[name].append(tokens / seconds[name][-1])
    return {
        name: {"seconds": statistics.median(seconds[name]), "tokens_per_s": statistics.median(rates[name])}
        for name in ways
    }


def figures(
    engine: Engine, own: Callable[[], int], queries: list[Query], sampling: Sampling, repeats: int, folder: Path
) -> dict[str, Any]:
    """Return the speed of one engine, bare and collecting, in turns with transformers' own generate."""
    prompts = list(PROMPTS.items())[:4]
    requests = [
        Request(template.format(query=q.query), derive_seed(sampling.seed, q.query_id, name, 0))
        for q in queries
        for name, template in prompts
    ]
    times = [0]

    def collecting() -> int:
        times[0] += 1
        out = folder / f"{engine.name}-{times[0]}.parquet"
        return collect(engine, queries, prompts, out, sampling=sampling, grade="numeric").progress.tokens_out

    bare(engine, requests[:64], sampling)
    ways = {"own": own, "bare": lambda: bare(engine, requests, sampling), "collect": collecting}
    found = measure(ways, repeats)
    return {
        "tokens_per_s": round(found["bare"]["tokens_per_s"]),
        "ratio_to_own_generate": round(found["bare"]["tokens_per_s"] / found["own"]["tokens_per_s"], 2),
        "overhead_of_collect": round(found["collect"]["seconds"] / found["bare"]["seconds"] - 1, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shape", choices=["small", "0.5b"], default="small")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--base-url", help="a server that serves the small model, for the engine openai")
    args = parser.parse_args()
    problems = generate_problems(args.requests // 4, random.Random(0))
    queries = [Query(f"q{i}", problem.query, str(problem.answer)) for i, problem in enumerate(problems)]
    sampling = Sampling(max_tokens=MAX_TOKENS, temperature=0.7)
    found: dict[str, Any] = {"requests": 4 * len(queries), "model": args.shape, "dtype": args.dtype}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = small_lm_path() if args.shape == "small" else random_model(folder / "model")
        texts = [t.format(query=q.query) for q in queries for t in list(PROMPTS.values())[:4]]
        own = plain_transformers(model, texts, args.dtype)
        engines: dict[str, dict[str, Any]] = {"transformers": {"dtype": args.dtype}}
        if importlib.util.find_spec("vllm"):
            os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
            on_cpu = {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 28} if args.shape == "small" else {}
            engines["vllm"] = {"dtype": args.dtype, "options": on_cpu}
        if args.base_url:
            engines["openai"] = {"base_url": args.base_url, "chat": False, "concurrency": 128}
        for kind, params in engines.items():
            with open_engine(kind, "small" if kind == "openai" else str(model), params) as engine:
                found[kind] = figures(engine, own, queries, sampling, args.repeats, folder)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
