"""The real vLLM on a CPU, in process and as a server: `make test-vllm` builds its environment and runs this."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, run_oirl

import oirl
from oirl.engines.base import EngineError, Probe, Request, Sampling
from oirl.engines.parity import check_parity
from oirl.errors import ConfigError
from oirl_data import small_lm_path
from oirl_data.problems import generate_problems
from oirl_data.prompts import PROMPTS

os.environ["TORCH_COMPILE_DISABLE"] = "1"  # one small function would be compiled for 17 s
pytest.importorskip("vllm", reason="make test-vllm builds the environment of the real vLLM")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from oirl.engines.openai_engine import OpenAIEngine
from oirl.engines.transformers_engine import TransformersEngine
from oirl.engines.vllm_engine import VLLMEngine

BASE = str(small_lm_path())
ON_CPU: dict[str, Any] = {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 27}
SETTINGS = Sampling(max_tokens=48, temperature=0.7, logprobs=True)
TEXTS = [f"{p.query} Work step by step." for p in generate_problems(24, random.Random(5))]


@pytest.fixture(scope="module")
def reference() -> Iterator[TransformersEngine]:
    with TransformersEngine(BASE) as engine:
        yield engine


@pytest.fixture(scope="module")
def engine() -> Iterator[VLLMEngine]:
    with VLLMEngine(BASE, dtype="float32", options=ON_CPU) as made:
        yield made


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", BASE]
    command += ["--served-model-name", "small", "--dtype", "float32", "--enforce-eager", "--host", "127.0.0.1"]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_SERVER_DEV_MODE": "1"}
    process = subprocess.Popen(
        [*command, "--port", str(port)],
        env=os.environ | settings,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            assert process.poll() is None, "the server did not start"
            try:
                urllib.request.urlopen(f"{address}/health", timeout=2)
                break
            except OSError:
                time.sleep(0.5)
        yield f"{address}/v1"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def changed(seed: int, **config: Any) -> Any:
    """Return the small model with other weights, those of the output among them."""
    model = AutoModelForCausalLM.from_pretrained(BASE, **config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * weight.std() * torch.randn(weight.shape, generator=generator)
    return model


def probe_of(model: Any, reference: TransformersEngine) -> Probe:
    prompts = [reference.tokens(text) for text in TEXTS[:8]]
    tokens = [reference.response_tokens("Step 1: 3 + 4 = 7. The answer is 7.", ended=True)] * len(prompts)
    scores = TransformersEngine(model, AutoTokenizer.from_pretrained(BASE)).score(prompts, tokens)
    return Probe(prompts, tokens, scores, 1e-4)


def test_logprobs_are_those_of_a_forward_pass(engine: VLLMEngine, reference: TransformersEngine) -> None:
    report = check_parity(engine, reference)
    assert report.agrees
    assert report.logprobs_are == "raw"
    assert max(d.max_abs for d in report.differences) < 1e-3
    assert report.prompt_tokens_agree == 1.0
    assert any("scoring" in d.case for d in report.differences)


def test_an_engine_tells_the_options_that_decide_what_it_draws(engine: VLLMEngine) -> None:
    told = engine.describe()
    assert (told["logprobs_mode"], told["options"]) == ("raw", {"enforce_eager": True})


def test_greedy_responses_are_those_of_transformers(engine: VLLMEngine, reference: TransformersEngine) -> None:
    greedy = Sampling(max_tokens=48, temperature=0.0)
    theirs, ours = (e.generate(TEXTS, greedy) for e in (engine, reference))
    assert [(c.text, c.token_ids, c.finish_reason) for (c,) in theirs] == [
        (c.text, c.token_ids, c.finish_reason) for (c,) in ours
    ]


def test_a_response_depends_on_its_seed_alone(engine: VLLMEngine) -> None:
    requests = [Request(text, 100 + i) for i, text in enumerate(TEXTS)]
    together = dict(engine.stream(requests, SETTINGS))
    alone = dict(engine.stream(requests[3:4], SETTINGS))
    assert alone[0][0].token_ids == together[3][0].token_ids
    others = dict(engine.stream([Request(r.rendered, r.seed + 1) for r in requests], SETTINGS))
    assert [together[i][0].token_ids for i in range(24)] != [others[i][0].token_ids for i in range(24)]


def test_samples_stops_and_refusals(engine: VLLMEngine) -> None:
    several = Sampling(max_tokens=48, temperature=0.7, n=3, stop=(". ",), logprobs=True)
    long, few, chat, fine = engine.generate(
        [" ".join(TEXTS[:9]), "", [{"role": "user", "content": "x"}], TEXTS[0]], several
    )
    assert all(c.refused and "tokens" in str(c.error) for c in long)
    assert all(c.refused and "chat template" in str(c.error) for c in chat)
    assert len(few) == len(fine) == 3
    for completion in fine:
        assert completion.finish_reason == "stop"
        assert ". " not in str(completion.text)
        assert len(completion.logprobs or ()) == len(completion.token_ids or ()) == completion.tokens_out


def test_an_abandoned_stream_leaves_nothing_running(engine: VLLMEngine) -> None:
    def endless() -> Iterator[Request]:
        while True:
            yield Request(TEXTS[0], 1)

    stream = engine.stream(endless(), SETTINGS)
    next(stream)
    stream.close()
    assert engine.generate(TEXTS[:1], SETTINGS)[0][0].error is None


def test_a_paused_engine_draws_nothing(engine: VLLMEngine) -> None:
    before = engine.generate(TEXTS[:2], SETTINGS)
    engine.pause()
    with pytest.raises(EngineError, match="paused"):
        engine.generate(TEXTS[:2], SETTINGS)
    with pytest.raises(EngineError, match="paused"):
        list(engine.stream([Request(TEXTS[0], 1)], SETTINGS))
    engine.resume()
    assert [c.text for (c,) in engine.generate(TEXTS[:2], SETTINGS)] == [c.text for (c,) in before]


def test_rows_that_fill_the_model_cannot_be_scored(engine: VLLMEngine) -> None:
    with pytest.raises(EngineError, match="scores up to 127 tokens"):
        engine.score([[1] * 100], [[7] * 28])
    assert len(engine.score([[1] * 100], [[7] * 27])[0]) == 27


# Closing one engine ends vLLM's global state for all of the process: those that open others come last.


@pytest.mark.parametrize("tied", [False, True])
def test_new_weights_are_taken_and_proved(tied: bool, tmp_path: Path, reference: TransformersEngine) -> None:
    start = changed(0, tie_word_embeddings=tied)
    start.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(tmp_path)
    torch.manual_seed(1)
    with VLLMEngine(str(tmp_path), dtype="float32", options=ON_CPU) as engine:
        drawn = torch.rand(3)
        torch.manual_seed(1)
        assert torch.equal(drawn, torch.rand(3)), "vLLM has changed the trainer's random state"
        engine.check_weights(probe_of(start, reference))
        for version in (1, 2):
            new = changed(version, tie_word_embeddings=tied)
            expected = probe_of(new, reference)
            with pytest.raises(EngineError, match="not those that were sent"):
                engine.check_weights(expected)
            assert engine.update_weights(new.state_dict().items(), expected) == version == engine.weight_version
            plain = TransformersEngine(new, AutoTokenizer.from_pretrained(BASE))
            assert check_parity(engine, plain).agrees
        # Weights that did not arrive whole must not pass in silence.
        half = [(name, weight) for name, weight in changed(3, tie_word_embeddings=tied).state_dict().items()][:5]
        with pytest.raises(EngineError):
            engine.update_weights(half, probe_of(changed(3, tie_word_embeddings=tied), reference))


def test_adapters_change_what_is_drawn(tmp_path: Path, reference: TransformersEngine) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(BASE),
        LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    model.save_pretrained(tmp_path)
    greedy = Sampling(max_tokens=32, temperature=0.0, logprobs=True)
    with (
        VLLMEngine(BASE, adapter=str(tmp_path), dtype="float32", options=ON_CPU) as engine,
        TransformersEngine(BASE, adapter=str(tmp_path)) as plain,
    ):
        ours = engine.generate(TEXTS[:8], greedy)
        assert [c.text for (c,) in ours] != [c.text for (c,) in reference.generate(TEXTS[:8], greedy)]
        prompts, tokens = zip(*((c.prompt_ids, c.token_ids) for (c,) in ours), strict=True)
        scores = plain.score(prompts, tokens)
        assert [c.logprobs for (c,) in ours] == [pytest.approx(tuple(row), abs=1e-3) for row in scores]
        assert engine.score(prompts, tokens) == [pytest.approx(row, abs=1e-3) for row in scores]
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError, match="cannot load the adapter"):
        VLLMEngine(BASE, adapter=str(tmp_path), dtype="float32", options=ON_CPU)
    with pytest.raises(ConfigError, match="no folder of a LoRA adapter"):
        VLLMEngine(BASE, adapter="nowhere", dtype="float32", options=ON_CPU)


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot load"):
        VLLMEngine(str(tmp_path))
    with pytest.raises(ConfigError, match="vLLM cannot load"):
        VLLMEngine(BASE, options={"no_such_argument": 1})


def write_files(folder: Path, n: int = 60) -> list[str]:
    problems = generate_problems(n, random.Random(1))
    rows = [json.dumps({"query": p.query, "answer": str(p.answer)}) for p in problems]
    (folder / "queries.jsonl").write_text("\n".join(rows))
    prompts = [json.dumps({"prompt_id": name, "prompt": PROMPTS[name]}) for name in ("steps", "answer", "plain")]
    (folder / "prompts.jsonl").write_text("\n".join(prompts))
    options = ["--queries", "queries.jsonl", "--prompts", "prompts.jsonl", "--grade", "numeric"]
    return [*options, "--temperature", "0.7", "--max-tokens", "48"]


def test_collecting_in_process(tmp_path: Path) -> None:
    options = write_files(tmp_path)
    settings = ["--set", "dtype=float32", "--set", f"options={json.dumps(ON_CPU)}"]
    done = run_oirl(
        "generate", "--engine", "vllm", "--model", BASE, *settings, *options, "--out", "log.parquet", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    log = oirl.read_log(tmp_path / "log.parquet")
    assert len(log) == 180
    rates = {p.prompt_id: p.success for p in map(_Row, json.loads(_audit(tmp_path))["prompts"])}
    assert rates["steps"] > rates["answer"]
    assert json.loads(log["sampling"][0].as_py())["engine"] == "vllm"


class _Row:
    def __init__(self, row: dict[str, Any]) -> None:
        self.prompt_id, self.success = row["prompt_id"], row["success"]


def _audit(folder: Path) -> str:
    return run_oirl("audit", folder / "log.parquet", "--json").stdout


def test_a_server_agrees_with_a_forward_pass(server: str, reference: TransformersEngine) -> None:
    with OpenAIEngine("small", base_url=server, chat=False) as engine:
        report = check_parity(engine, reference)
        assert report.agrees
        assert report.prompt_tokens_agree == 1.0
        assert any("scoring" in d.case for d in report.differences)
        assert engine.describe()["server_version"]
    done = run_oirl(
        "doctor", "--engine", "openai", "--model", "small", "--reference", BASE, "--set", f"base_url={server}",
        "--set", "chat=false", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["agrees"] is True


def test_collecting_from_a_server_survives_being_killed(server: str, tmp_path: Path) -> None:
    options = write_files(tmp_path)
    where = ["--engine", "openai", "--model", "small", "--set", f"base_url={server}", "--set", "chat=false"]
    command = ["generate", *where, *options]
    whole = run_oirl(*command, "--out", "whole.parquet", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / p) for p in (".", "cli", "data"))}
    slow = ["--set", "concurrency=1", "--out", "killed.parquet"]
    process = subprocess.Popen(
        [sys.executable, "-m", "oirl_cli", *command, *slow], cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL
    )
    journal = tmp_path / "killed.parquet.journal"
    while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > 20):
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert journal.exists(), "it was killed too late"
    done = run_oirl(*command, "--out", "killed.parquet", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    columns = ["query_id", "prompt_id", "replicate", "response", "correct", "tokens_in", "tokens_out"]
    both = [oirl.read_log(tmp_path / name, columns) for name in ("whole.parquet", "killed.parquet")]
    assert both[0].equals(both[1])
    assert len(both[0]) == 180


def test_prompts_are_proposed_raced_and_confirmed_on_a_server(server: str, tmp_path: Path) -> None:
    options = write_files(tmp_path, 160)
    where = ["--engine", "openai", "--model", "small", "--set", f"base_url={server}", "--set", "chat=false"]
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt_id": "answer", "prompt": PROMPTS["answer"]}))
    done = run_oirl("generate", *where, *options, "--out", "log.parquet", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (tmp_path / "scripted.py").write_text(SCRIPTED)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([*(str(ROOT / p) for p in (".", "cli", "data")), str(tmp_path)])
    }
    command = [sys.executable, "-m", "oirl_cli", "propose", "log.parquet", *where, "--out", "new.jsonl", "--n", "3"]
    command += ["--proposer-engine", "scripted:Scripted", "--proposer-model", "scripted", "--race", "60"]
    command += ["--confirm", "90", "--temperature", "0.7", "--max-tokens", "48", "--json"]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    race = json.loads(ended.stdout)["race"]
    assert race["incumbent"] == "answer"
    assert race["winner"] != "answer"
    assert race["ci_low"] > 0


SCRIPTED = """
from oirl.engines.base import Completion, Engine

WORDS = ["{query} Work step by step.", "List what is known, then solve it. {query}", "{query} Draw a table first."]


class Scripted(Engine):
    name, chat = "scripted", True

    def __init__(self, model):
        self.model = model

    def describe(self):
        return {"engine": self.name, "model": self.model}

    def stream(self, requests, sampling):
        for i, _ in enumerate(requests):
            yield i, [Completion(f"<prompt>{WORDS[i % 3]}</prompt>", "stop")]
"""


# Tuning with responses drawn by vLLM


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_apa_learns_with_vllm_and_proves_the_weights_after_each_update(lora_rank: int, tmp_path: Path) -> None:
    """A short run whose reward rises; each iteration after the first sends the weights, and a probe is scored."""
    rows = [{"query": p.query, "answer": str(p.answer)} for p in generate_problems(80, random.Random(6), held_out=True)]
    (tmp_path / "queries.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {
        "model": BASE, "queries": str(tmp_path / "queries.jsonl"), "out": str(tmp_path / "run"), "grade": "numeric",
        "iterations": 10, "rollouts": 64, "max_tokens": 48, "batch": 32, "micro_batch": 32, "held_out": 0.0,
        "learning_rate": 2e-3 if lora_rank else 5e-4, "lora_rank": lora_rank,
        "engine": "vllm", "engine_params": {"dtype": "float32", "options": ON_CPU},
    }  # fmt: skip
    (tmp_path / "c.yaml").write_text(json.dumps(settings))
    done = run_oirl("tune", "apa", "--config", tmp_path / "c.yaml", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["iterations"]
    assert abs(rows[0]["kl"]) < 0.05
    assert rows[-1]["kl"] > 0.2
    # vLLM draws from the weights that are trained: its log-probs are the trainer's, in every iteration.
    assert all(row["engine_gap"] < 2e-3 for row in rows)
    first, last = (sum(row["reward"] for row in some) / 3 for some in (rows[:3], rows[-3:]))
    assert last > first + 0.05
    times = [json.loads(line) for line in (tmp_path / "run" / "times.jsonl").read_text().splitlines()]
    assert ["seconds_sync" in row for row in times] == [False] + [True] * 9


def test_ppo_learns_with_a_vllm_server_that_is_sent_the_weights(server: str, tmp_path: Path) -> None:
    """The last test of those that share the server: it has other weights afterwards."""
    rows = [{"query": p.query, "answer": str(p.answer)} for p in generate_problems(40, random.Random(6), held_out=True)]
    (tmp_path / "queries.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {
        "model": BASE, "queries": str(tmp_path / "queries.jsonl"), "out": str(tmp_path / "run"), "grade": "numeric",
        "iterations": 3, "rollouts": 32, "max_tokens": 48, "batch": 16, "micro_batch": 16, "held_out": 0.0,
        "learning_rate": 5e-4, "engine": "openai",
        "engine_params": {
            "model": "small", "base_url": server, "chat": False, "weights_folder": str(tmp_path / "weights"),
        },
    }  # fmt: skip
    (tmp_path / "c.yaml").write_text(json.dumps(settings))
    done = run_oirl("tune", "ppo", "--config", tmp_path / "c.yaml", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["iterations"]
    assert abs(rows[0]["kl"]) < 0.05
    assert rows[-1]["kl"] > 0.02
    assert all(row["engine_gap"] < 2e-3 for row in rows)
    assert not list((tmp_path / "weights").iterdir())


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_raft_draws_with_vllm_and_sends_it_the_new_weights(lora_rank: int, tmp_path: Path) -> None:
    """In a process of its own: one engine a process."""
    rows = [{"query": p.query, "answer": str(p.answer)} for p in generate_problems(16, random.Random(6), held_out=True)]
    (tmp_path / "queries.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {
        "model": BASE, "queries": str(tmp_path / "queries.jsonl"), "out": str(tmp_path / "run"), "grade": "numeric",
        "iterations": 2, "samples": 4, "max_tokens": 48, "batch": 4, "micro_batch": 4, "learning_rate": 1e-2,
        "epochs": 3, "held_out": 0.2, "min_reward": 0, "lora_rank": lora_rank, "kl_coef": 0.01,
        "engine": "vllm", "engine_params": {"dtype": "float32", "options": ON_CPU},
    }  # fmt: skip
    (tmp_path / "c.yaml").write_text(json.dumps(settings))
    done = run_oirl("tune", "raft", "--config", tmp_path / "c.yaml", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout)["iterations"]
    assert abs(first["kl"]) < 0.05  # vLLM drew from the initial weights,
    assert second["kl"] > 10 * abs(first["kl"]) + 0.05  # and then from others: what it was sent
    log = oirl.read_log(tmp_path / "run" / "rollouts" / "iteration-001")
    assert {json.loads(text)["engine"] for text in log["sampling"].to_pylist()} == {"vllm"}
