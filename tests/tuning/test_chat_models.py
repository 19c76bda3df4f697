"""Models with a chat template: what they are trained on is what they are asked, to the token."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from small_runs import CORRECT, RELABEL, make_queries, quick, write_queries, write_small_log

import oirl
from oirl.language_models import load_tokenizer, trained_prompts
from oirl.logs.rendering import messages
from oirl.tuning.configuring import make_settings
from oirl.tuning.examples import Encoder
from oirl.tuning.policy import Policy
from oirl.tuning.rollouts import rollouts_of_log
from oirl_data import small_lm_path

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}so {% endif %}{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %} and{% endif %}"
)


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "chatty"
    copytree(small_lm_path(), folder)
    tokenizer = load_tokenizer(str(folder))
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)


def asked(model: str, template: str, query: str) -> list[int]:
    """Return the tokens that a chat of a template and a query has."""
    text = {"{query}": f"{query} and", CORRECT.replace("{prompt}", "{query}"): f"The answer is equal . {query} and"}
    return list(load_tokenizer(model)(text[template], add_special_tokens=False)["input_ids"])


def drawn(engine: Any, template: str) -> Any:
    query = make_queries(1)[0].query
    ((completion,),) = engine.generate([messages(template, query)], oirl.Sampling(max_tokens=8, logprobs=True))
    assert list(completion.prompt_ids) == asked(engine.model, template, query)
    return completion


def test_sft_learns_under_the_chat_template_and_keeps_it(chatty: str, tmp_path: Path) -> None:
    log = write_small_log(tmp_path / "log.parquet", 20)
    settings = quick(tmp_path / "run", model=chatty, log=log, epochs=8, learning_rate=1e-3)
    (first, *_) = [r for r in rollouts_of_log(oirl.read_log(log)) if r.prompt == "{query}"]
    example = Encoder(Policy(make_settings("sft", settings))).example(first, first.prompt)
    assert example is not None
    assert example.context == asked(chatty, "{query}", first.query)
    report = oirl.tune("sft", settings)
    assert report.after["loss"] < report.before["loss"]
    assert load_tokenizer(report.model).chat_template == TEMPLATE
    with oirl.open_engine("transformers", report.model) as engine:
        assert engine.chat
        assert drawn(engine, "{query}").error is None


def test_hir_samples_and_learns_under_the_chat_template(chatty: str, tmp_path: Path) -> None:
    queries = write_queries(make_queries(12), tmp_path / "queries.jsonl")
    settings = quick(tmp_path / "run", model=chatty, queries=queries, relabel=RELABEL, iterations=2, samples=4)
    report = oirl.tune("hir", settings)
    template = CORRECT.replace("{prompt}", "{query}")
    for iteration in range(2):
        for row in oirl.read_log(tmp_path / "run" / "rollouts" / f"iteration-{iteration:03}").to_pylist():
            assert json.loads(row["metadata"])["prompt_ids"] == asked(chatty, template, row["query"])
    assert (trained_prompts(report.model) or [])[0] == template
    assert [row["examples"] for row in report.iterations] == [row["responses"] for row in report.iterations]
    with oirl.open_engine("transformers", report.model) as engine:
        assert drawn(engine, template).error is None
