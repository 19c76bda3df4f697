"""Speed of engines on the demo's small language model, and the overhead of collecting a log. Prints JSON.

Tokens a second of every engine that is installed, bare and collecting, on the same requests; beside the engine
`transformers` its own `generate` with sampling (batches of 32, padded, in the order given). Runs alternate, and the
fastest of each counts: what else the machine does only slows them. The overhead of `collect` (rendering, grading,
journal, log) is its time outside of the engine over that within, of one and the same run, the median of them; a server
works on meanwhile, so of it this is the most that it can be.

Where vLLM is installed (`make bench-vllm`) it is measured in process, and through the engine `openai` as a server that
is started here, on 127.0.0.1.

Run: python benchmarks/engine_speed.py [--requests 2000] [--repeats 3] [--shape 0.5b --dtype bfloat16]
(`--shape 0.5b` makes a model of Qwen2-0.5B's shape with random weights: for GPUs.)
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
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


class Watch:
    """Seconds spent in an engine's `stream`, but not in what gives it its requests."""

    def __init__(self, engine: Engine) -> None:
        self.inside, self._stream = 0.0, engine.stream
        engine.stream = self.stream  # type: ignore[method-assign]

    def stream(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Any]:
        """Yield what the engine yields."""
        yield from self._timed(self._stream(self._timed(requests, -1), sampling), 1)

    def _timed(self, items: Iterable[Any], sign: int) -> Iterator[Any]:
        waiting = iter(items)
        while True:
            began = time.perf_counter()
            try:
                item = next(waiting)
            except StopIteration:
                return
            finally:
                self.inside += sign * (time.perf_counter() - began)
            yield item


def figures(
    engine: Engine,
    others: dict[str, Callable[[], int]],
    queries: list[Query],
    sampling: Sampling,
    repeats: int,
    folder: Path,
) -> dict[str, Any]:
    """Return the speed of one engine, bare and collecting, and of others in turns with it."""
    prompts = list(PROMPTS.items())[:4]
    requests = [
        Request(template.format(query=q.query), derive_seed(sampling.seed, q.query_id, name, 0))
        for q in queries
        for name, template in prompts
    ]
    watch, overheads = Watch(engine), []

    def collecting() -> int:
        watch.inside, began, out = 0.0, time.perf_counter(), folder / f"{engine.name}-{len(overheads)}.parquet"
        made = collect(engine, queries, prompts, out, sampling=sampling, grade="numeric").progress
        overheads.append((time.perf_counter() - began) / watch.inside - 1)
        return made.tokens_out

    bare(engine, requests[:64], sampling)
    ways = others | {"bare": lambda: bare(engine, requests, sampling), "collect": collecting}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, run in ways.items():
            began = time.perf_counter()
            tokens = run()
            rates[name].append(tokens / (time.perf_counter() - began))
    told: dict[str, Any] = {f"tokens_per_s_{name}": round(max(rates[name])) for name in ways}
    for name in others:
        told[f"ratio_to_{name}"] = round(max(rates["bare"]) / max(rates[name]), 2)
    return told | {"overhead_of_collect": round(statistics.median(overheads), 3)}


@contextmanager
def vllm_server(model: Path, dtype: str, small: bool, folder: Path) -> Iterator[str]:
    """Serve a model as `small` on this machine with vLLM, and yield the address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--dtype", dtype]
    command += ["--served-model-name", "small", "--host", "127.0.0.1", "--port", str(port)]
    settings = {"VLLM_NO_USAGE_STATS": "1"}
    if small:  # on a CPU; there a prompt that is read in two steps cannot have a seed, and ends the server (vLLM 0.32)
        command += ["--enforce-eager", "--no-enable-chunked-prefill"]
        settings["VLLM_CPU_KVCACHE_SPACE"] = "1"
    log = folder / "server.log"
    with log.open("wb") as said:
        process = subprocess.Popen(
            command,
            env=os.environ | settings,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
        try:
            while not _healthy(f"http://127.0.0.1:{port}/health"):
                if process.poll() is not None:
                    sys.exit(f"vLLM's server did not start: {log.read_text(errors='replace')[-2000:]}")
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1"
        except Exception:
            sys.stderr.write(log.read_text(errors="replace")[-2000:])
            raise
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _healthy(url: str) -> bool:
    try:
        return bool(urllib.request.urlopen(url, timeout=2).status == 200)
    except OSError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shape", choices=["small", "0.5b"], default="small")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    small = args.shape == "small"
    if small:
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")  # vLLM would compile one small function for 17 s
    problems = generate_problems(args.requests // 4, random.Random(0))
    queries = [Query(f"q{i}", problem.query, str(problem.answer)) for i, problem in enumerate(problems)]
    sampling = Sampling(max_tokens=MAX_TOKENS, temperature=0.7)
    found: dict[str, Any] = {"requests": 4 * len(queries), "repeats": args.repeats, "model": args.shape}
    found |= {"dtype": args.dtype, "cpus": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = small_lm_path() if small else random_model(folder / "model")
        texts = [t.format(query=q.query) for q in queries for t in list(PROMPTS.values())[:4]]

        def run(kind: str, name: str, params: dict[str, Any], **others: Callable[[], int]) -> None:
            with open_engine(kind, name, params) as engine:
                found[kind] = figures(engine, others, queries, sampling, args.repeats, folder)

        own = plain_transformers(model, texts, args.dtype)
        run("transformers", str(model), {"dtype": args.dtype}, own_generate=own)
        if importlib.util.find_spec("vllm"):
            # The server first: vLLM in this process binds it, and whatever it starts, to its cores.
            with vllm_server(model, args.dtype, small, folder) as url:
                run("openai", "small", {"base_url": url, "chat": False, "concurrency": 128})
            options = {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 28} if small else {}
            run("vllm", str(model), {"dtype": args.dtype, "options": options})
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
