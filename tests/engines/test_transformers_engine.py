"""The engine transformers: what it draws is the model's own distribution, row by row, whatever else runs with it."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import random
import shutil
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy.stats import chisquare

from oirl.engines.base import Completion, Engine, EngineError, Probe, Request, Sampling, derive_seed
from oirl.engines.draws import uniforms
from oirl.engines.opening import open_engine
from oirl.engines.transformers_engine import TransformersEngine
from oirl.errors import ConfigError, OirlError, UnknownNameError
from oirl.language_models import load_language_model, load_tokenizer
from oirl_data import small_lm_path
from oirl_data.problems import generate_problems

BASE = str(small_lm_path())
LIMIT = 128  # positions of the small model
END = 2  # its end-of-text token
QUERIES = [p.query for p in generate_problems(10, random.Random(3))] + ["How ?", "Anna has 12 books . " * 4]
GREEDY = Sampling(max_tokens=32, temperature=0, logprobs=True)
PLATES = "A shop has 37 grey plates. Sam buys 6 of them. How many plates are left in the shop?"
REPLY = "37 - 6 = 31. The answer is 31."  # greedily
DRAWN = Sampling(max_tokens=32, logprobs=True)
NARROW = Sampling(max_tokens=32, temperature=1.3, top_p=0.8, top_k=12, logprobs=True)
TURNS = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} . {% endfor %}"
TEMPLATE = TURNS + "{% if add_generation_prompt %}Answer{% endif %}"
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system, please') }}{% endif %}" + TEMPLATE


@cache
def loaded() -> tuple[Any, Any]:
    return load_language_model(BASE), load_tokenizer(BASE)


@pytest.fixture(scope="module")
def model() -> Any:
    return loaded()[0].eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return loaded()[1]


@pytest.fixture(scope="module")
def engine(model: Any, tokenizer: Any) -> TransformersEngine:
    return TransformersEngine(model, tokenizer)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a LoRA adapter whose weights are not those of a start, which would change nothing."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    folder = tmp_path_factory.mktemp("adapters") / "one"
    peft.get_peft_model(load_language_model(BASE), config).save_pretrained(folder)
    return folder


def logprobs_by_hand(model: Any, completion: Completion) -> np.ndarray:
    """Return the log-probs (tokens, v) of one response from a forward pass of its own."""
    assert completion.prompt_ids is not None
    assert completion.token_ids is not None
    row = [*completion.prompt_ids, *completion.token_ids]
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([row])).logits[0].double().numpy()
    wanted = logits[len(completion.prompt_ids) - 1 : -1]
    return (
        wanted
        - np.log(np.exp(wanted - wanted.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - wanted.max(-1, keepdims=True)
    )


def narrowed(logprobs: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Return probabilities after temperature, top-k and top-p, one position at a time."""
    found = []
    for row in logprobs:
        p = np.exp((row - row.max()) / sampling.temperature)
        if sampling.top_k is not None:
            p[p < np.sort(p)[-sampling.top_k]] = 0
        p /= p.sum()
        if sampling.top_p < 1:
            order = np.argsort(-p, kind="stable")
            n = int((np.cumsum(p[order]) < sampling.top_p).sum()) + 1
            p[order[n:]] = 0
        found.append(p / p.sum())
    return np.stack(found)


def at(logprobs: np.ndarray, completion: Completion) -> list[float]:
    return [float(row[token]) for row, token in zip(logprobs, completion.token_ids or (), strict=True)]


def run(engine: Engine, requests: list[Request], sampling: Sampling) -> list[list[Completion]]:
    found: dict[int, list[Completion]] = {}
    for position, completions in engine.stream(requests, sampling):
        assert position not in found
        found[position] = completions
    return [found[i] for i in range(len(requests))]


def same(one: Completion, other: Completion) -> bool:
    """Whether two completions are the same response; log-probs up to the rounding of sums."""
    exact = ("text", "finish_reason", "token_ids", "prompt_ids", "tokens_in", "tokens_out", "error", "refused")
    close = one.logprobs == other.logprobs or one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    return close and all(getattr(one, name) == getattr(other, name) for name in exact)


def ids_and_text(completions: list[list[Completion]]) -> list[tuple[Any, ...]]:
    return [(c.token_ids, c.text, c.finish_reason) for (c,) in completions]


def with_settings(model: Any, **options: Any) -> Any:
    """Return a copy of the model with its own settings for generating."""
    made = copy.deepcopy(model)
    for name, value in options.items():
        setattr(made.generation_config, name, value)
    return made


def with_template(tokenizer: Any, template: str) -> Any:
    made = copy.deepcopy(tokenizer)
    made.chat_template = template
    return made


# What is drawn


def test_greedy_is_what_transformers_itself_generates(engine: TransformersEngine, model: Any) -> None:
    for (found,) in engine.generate(QUERIES, GREEDY):
        ids = torch.tensor([found.prompt_ids])
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=GREEDY.max_tokens
        )
        assert list(found.token_ids or ()) == out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN, NARROW], ids=["greedy", "drawn", "narrow"])
def test_raw_logprobs_are_those_of_the_model(engine: TransformersEngine, model: Any, sampling: Sampling) -> None:
    for (found,) in engine.generate(QUERIES, sampling):
        assert found.logprobs == pytest.approx(at(logprobs_by_hand(model, found), found), abs=1e-4)


@pytest.mark.parametrize("sampling", [DRAWN, NARROW], ids=["drawn", "narrow"])
def test_processed_logprobs_are_those_of_the_draw(
    engine: TransformersEngine, model: Any, tokenizer: Any, sampling: Sampling
) -> None:
    processed = TransformersEngine(model, tokenizer, logprobs_mode="processed")
    raw = engine.generate(QUERIES, sampling)
    found = processed.generate(QUERIES, sampling)
    assert ids_and_text(found) == ids_and_text(raw)
    for (one,) in found:
        expected = np.log(at(narrowed(logprobs_by_hand(model, one), sampling), one))
        assert one.logprobs == pytest.approx(expected.tolist(), abs=1e-3)


def test_greedy_logprobs_are_the_model_s_also_if_processed(model: Any, tokenizer: Any) -> None:
    for (found,) in TransformersEngine(model, tokenizer, logprobs_mode="processed").generate(QUERIES, GREEDY):
        assert found.logprobs == pytest.approx(at(logprobs_by_hand(model, found), found), abs=1e-4)


@pytest.mark.parametrize("sampling", [DRAWN, NARROW], ids=["drawn", "narrow"])
def test_every_token_is_drawn_by_the_seed_of_its_request(
    engine: TransformersEngine, model: Any, sampling: Sampling
) -> None:
    """The t-th number of the seed falls into the token's stretch of the cumulated probability."""
    requests = [Request(q, 100 + i) for i, q in enumerate(QUERIES)]
    for request, (found,) in zip(requests, run(engine, requests, sampling), strict=True):
        p = narrowed(logprobs_by_hand(model, found), sampling)
        numbers = uniforms([request.seed], len(p))[0]
        for row, token, number in zip(p, found.token_ids or (), numbers, strict=True):
            assert row[:token].sum() - 1e-5 <= number <= row[: token + 1].sum() + 1e-5


def test_frequencies_of_two_tokens_are_those_of_the_model(model: Any, tokenizer: Any) -> None:
    n = 2000
    sampling = Sampling(max_tokens=2, temperature=0.8, n=n, seed=1)
    ((*found,),) = TransformersEngine(model, tokenizer, batch_size=500).generate(["How many apples ?"], sampling)
    counts = Counter(c.token_ids for c in found)
    prompt = found[0].prompt_ids
    first = narrowed(logprobs_by_hand(model, Completion("", token_ids=(0,), prompt_ids=prompt)), sampling)[0]
    likely = np.argsort(-first)[:6]
    observed, expected = [], []
    for a in likely.tolist():
        one = Completion("", token_ids=(a, 0), prompt_ids=prompt)
        second = narrowed(logprobs_by_hand(model, one), sampling)[1]
        for b in np.argsort(-second)[:5].tolist():
            observed.append(counts[(a, b)])
            expected.append(n * first[a] * second[b])
    observed.append(n - sum(observed))
    expected.append(n - sum(expected))
    enough = np.array(expected) >= 5
    assert enough.sum() >= 12
    kept = [np.append(x[enough], x[~enough].sum() + 1e-9) for x in (np.array(observed, float), np.array(expected))]
    assert chisquare(*kept).pvalue > 1e-3


# What else is in the batch


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN, NARROW], ids=["greedy", "drawn", "narrow"])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_batch_size_does_not_matter(
    engine: TransformersEngine, model: Any, tokenizer: Any, batch_size: int, sampling: Sampling
) -> None:
    whole = engine.generate(QUERIES, sampling)
    parts = TransformersEngine(model, tokenizer, batch_size=batch_size).generate(QUERIES, sampling)
    assert all(same(a, b) for (a,), (b,) in zip(whole, parts, strict=True))


def test_neither_order_nor_company_matter(engine: TransformersEngine) -> None:
    requests = [Request(q, 7 * i) for i, q in enumerate(QUERIES)]
    whole = run(engine, requests, NARROW)
    turned = run(engine, requests[::-1], NARROW)[::-1]
    alone = [run(engine, [request], NARROW)[0] for request in requests]
    others = run(engine, [*requests[:3], Request("They sells red toys " * 20, 5), Request("x", 6)], NARROW)
    for (a,), (b,), (c,) in zip(whole, turned, alone, strict=True):
        assert same(a, b)
        assert same(a, c)
    assert all(same(a, b) for (a,), (b,) in zip(whole[:3], others[:3], strict=True))


@given(
    st.lists(st.integers(0, 42).map(lambda k: "Anna has 12 " * k + "How"), min_size=2, max_size=5),
    st.sampled_from([0.0, 0.7, 1.5]),
    st.sampled_from([0.5, 1.0]),
    st.sampled_from([None, 7]),
    st.integers(1, 25),
    st.integers(1, 4),
    st.sampled_from([(), ("1",), (". The", "=")]),
)
@settings(max_examples=12, deadline=None, derandomize=True)
def test_any_batch_is_as_its_rows_alone(
    texts: list[str], temperature: float, top_p: float, top_k: int | None, max_tokens: int, batch: int, stop: tuple
) -> None:
    sampling = Sampling(max_tokens, temperature, top_p, top_k, stop, logprobs=True)
    requests = [Request(text, 3 * i) for i, text in enumerate(texts)]
    parts = TransformersEngine(*loaded(), batch_size=batch)
    for request, (found,) in zip(requests, run(parts, requests, sampling), strict=True):
        ((expected,),) = run(parts, [request], sampling)
        assert same(found, expected)


def test_same_request_and_seed_give_the_same_response_wherever_they_stand(engine: TransformersEngine) -> None:
    found = run(engine, [Request(QUERIES[0], 5), Request(QUERIES[1], 5), Request(QUERIES[0], 5)], DRAWN)
    assert same(found[0][0], found[2][0])


def test_another_seed_gives_other_responses(engine: TransformersEngine) -> None:
    one, other = (engine.generate(QUERIES, Sampling(max_tokens=32, seed=seed)) for seed in (0, 1))
    assert sum(a[0].token_ids != b[0].token_ids for a, b in zip(one, other, strict=True)) > len(QUERIES) / 2
    assert ids_and_text(engine.generate(QUERIES, Sampling(max_tokens=32, seed=0))) == ids_and_text(one)


def test_equal_texts_get_draws_of_their_own(engine: TransformersEngine) -> None:
    found = engine.generate([QUERIES[0]] * 8, Sampling(32, 1.5))
    assert len({c.token_ids for (c,) in found}) > 4


def test_greedy_does_not_depend_on_the_seed(engine: TransformersEngine) -> None:
    one, other = (engine.generate(QUERIES[:3], Sampling(32, 0.0, seed=seed)) for seed in (0, 1))
    assert ids_and_text(one) == ids_and_text(other)


def test_samples_are_draws_of_their_own_and_the_first_is_that_of_one(model: Any, tokenizer: Any) -> None:
    parts = TransformersEngine(model, tokenizer, batch_size=5)  # samples of a request stand in several batches
    requests = [Request(q, i) for i, q in enumerate(QUERIES[:4])]
    ones, fives, eights = (run(parts, requests, Sampling(32, 1.5, n=n, logprobs=True)) for n in (1, 5, 8))
    for one, five, eight in zip(ones, fives, eights, strict=True):
        assert (len(one), len(five), len(eight)) == (1, 5, 8)
        assert len({c.token_ids for c in eight}) > 3
        assert same(one[0], five[0])
        assert all(same(a, b) for a, b in zip(five, eight, strict=False))


def test_what_a_completion_tells(engine: TransformersEngine, tokenizer: Any) -> None:
    for query, (found,) in zip(QUERIES, engine.generate(QUERIES, DRAWN), strict=True):
        assert found.prompt_ids == tuple(tokenizer(query)["input_ids"])
        assert found.tokens_in == len(found.prompt_ids)
        assert found.token_ids is not None
        assert found.tokens_out == len(found.token_ids) == len(found.logprobs or ()) <= 32
        assert found.finish_reason == ("stop" if found.token_ids[-1] == END else "length")
        assert END not in found.token_ids[:-1]
        assert found.text == tokenizer.decode([t for t in found.token_ids if t > END])
        assert found.error is None
        assert not found.refused
        assert found.latency_s is not None
        assert 0 <= found.latency_s < 60


def test_logprobs_are_told_only_if_asked_for(engine: TransformersEngine) -> None:
    ((found,),) = engine.generate(QUERIES[:1], Sampling(max_tokens=9))
    assert found.logprobs is None
    assert found.token_ids


def test_nothing_to_do(engine: TransformersEngine) -> None:
    assert engine.generate([], DRAWN) == []
    assert list(engine.stream(iter(()), DRAWN)) == []


# Where a response ends


STOPS = [(".",), ("=",), (" =",), ("= 2",), ("answer is",), ("1", "="), (". The", "; "), ("+ ",), ("never", "=")]


def check_stops(model: Any, tokenizer: Any, texts: list[str], sampling: Sampling, stop: tuple[str, ...]) -> int:
    """Hold responses with stop strings against those without, and return how many are cut.

    They are cut before the first stop string, and their tokens end with the first after which the text holds one; after
    that nothing more is drawn.
    """
    hits, passes = 0, []
    engine = TransformersEngine(model, tokenizer)
    whole = engine.generate(texts, sampling)
    counting = model.register_forward_pre_hook(lambda *_: passes.append(1))
    cut = engine.generate(texts, replace(sampling, stop=stop))
    counting.remove()
    assert len(passes) == max(c.tokens_out or 0 for (c,) in cut)
    for (full,), (found,) in zip(whole, cut, strict=True):
        assert full.token_ids is not None
        assert full.logprobs is not None
        ids = full.token_ids
        so_far = [tokenizer.decode(ids[: k + 1], skip_special_tokens=True) for k in range(len(ids))]
        last = next((k for k, text in enumerate(so_far) if any(s in text for s in stop)), None)
        if last is None:
            assert same(found, full)
            continue
        hits += 1
        assert found.text == so_far[last][: min(so_far[last].find(s) for s in stop if s in so_far[last])]
        assert found.finish_reason == "stop"
        assert found.token_ids == full.token_ids[: last + 1]
        assert found.tokens_out == last + 1
        assert found.logprobs == pytest.approx(full.logprobs[: last + 1], abs=1e-4)
    return hits


@pytest.mark.parametrize("stop", STOPS)
def test_a_stop_string_ends_a_response(model: Any, tokenizer: Any, stop: tuple[str, ...]) -> None:
    assert check_stops(model, tokenizer, QUERIES, DRAWN, stop) >= 2
    check_stops(model, tokenizer, [PLATES], GREEDY, stop)


def test_a_stop_string_may_be_of_many_tokens(model: Any, tokenizer: Any) -> None:
    for stop in (REPLY, REPLY[:-1], "= 31. The answer is 31"):
        assert check_stops(model, tokenizer, [PLATES], GREEDY, (stop,)) == 1


def test_a_stop_string_may_be_of_tokens_that_are_parts_of_characters() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {c: i for i, c in enumerate(["<pad>", "<s>", "</s>", "Ã", "©", "a", "b", "Ġ", "ab"])}  # Ã© is é
    raw = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    assert tokenizer.decode([3, 4, 8]) == "éab"
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=9, **sizes)).eval()
    for stop in (("é",), ("éa",), ("aé", "bb"), ("a b", "é")):
        hits = check_stops(model, tokenizer, ["ab"] * 50, Sampling(200, logprobs=True), stop)
        assert hits >= (5 if "é" in stop else 0)


def test_of_two_stop_strings_the_first_in_the_text_counts(engine: TransformersEngine) -> None:
    ((full,),) = engine.generate([PLATES], GREEDY)
    assert full.text == REPLY
    for stop in (("=", "-"), ("-", "="), ("6 =", "- 6 =")):
        ((found,),) = engine.generate([PLATES], Sampling(32, 0.0, stop=stop))
        assert (found.text, found.finish_reason) == ("37 ", "stop")
    assert found.tokens_out == 4  # the token that completes either


def test_a_stop_string_in_the_prompt_does_not_count(engine: TransformersEngine) -> None:
    ((found,),) = engine.generate(["37 - 6 = 31 . How many"], Sampling(20, 0.0, stop=("many", "37 - 6 = 31.")))
    assert found.finish_reason == "length" or found.token_ids[-1] == END


def test_a_stop_string_that_never_comes_changes_nothing(engine: TransformersEngine) -> None:
    whole = engine.generate(QUERIES, DRAWN)
    found = engine.generate(QUERIES, Sampling(32, stop=("never", "</s>"), logprobs=True))
    assert all(same(a, b) for (a,), (b,) in zip(whole, found, strict=True))


@pytest.mark.parametrize("max_tokens", [1, 2, 7])
def test_max_tokens_is_length(engine: TransformersEngine, max_tokens: int) -> None:
    whole = engine.generate(QUERIES, DRAWN)
    for (full,), (found,) in zip(whole, engine.generate(QUERIES, Sampling(max_tokens)), strict=True):
        assert found.token_ids == (full.token_ids or ())[:max_tokens]
        assert found.finish_reason == ("stop" if found.token_ids[-1] == END else "length")


def test_an_end_or_a_stop_string_at_the_very_last_token_is_no_length(engine: TransformersEngine) -> None:
    ((full,),) = engine.generate([PLATES], GREEDY)
    assert (full.token_ids[-1], full.tokens_out) == (END, 12)
    for most, stop, reason, text in [
        (12, (), "stop", full.text),
        (11, (), "length", full.text),
        (3, ("6",), "stop", "37 - "),
        (2, ("6",), "length", "37 -"),
    ]:
        ((found,),) = engine.generate([PLATES], Sampling(most, 0.0, stop=stop))
        assert (found.finish_reason, found.text) == (reason, text)


def test_texts_too_long_are_refused_and_the_others_answered(engine: TransformersEngine) -> None:
    texts = ["How many ?", "apples " * LIMIT, QUERIES[0], "apples " * (LIMIT - 1), "apples " * 5000]
    expected = [run(engine, [Request(text, derive_seed(0, i))], DRAWN)[0][0] for i, text in enumerate(texts)]
    found = [c for (c,) in engine.generate(texts, DRAWN)]
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))
    assert [c.text is None for c in found] == [False, True, False, True, True]
    for one in (found[1], found[3], found[4]):
        assert one.refused
        assert "tokens" in (one.error or "")
        assert "\n" not in (one.error or "")
        assert (one.token_ids, one.finish_reason) == (None, None)
    assert "5,001" in (found[4].error or "")
    assert "128" in (found[3].error or "")
    assert [len(c) for c in engine.generate(texts[:2], Sampling(5, n=3))] == [3, 3]


def test_a_text_without_tokens_is_refused(model: Any, tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    bare = copy.deepcopy(tokenizer)
    bare.backend_tokenizer.post_processor = TemplateProcessing(single="$A")  # no token before a text
    assert bare("")["input_ids"] == []
    found = TransformersEngine(model, bare).generate(["How ?", "", "  "], DRAWN)
    assert [c.refused for (c,) in found] == [False, True, True]
    assert found[0][0].text is not None
    assert "no tokens" in (found[1][0].error or "")


def test_a_text_that_is_no_unicode_is_refused_and_the_others_answered(engine: TransformersEngine) -> None:
    found = engine.generate(["How many ?", "How \ud800 ?", QUERIES[0]], DRAWN)
    assert [c.refused for (c,) in found] == [False, True, False]
    assert found[1][0].text is None


def test_near_the_limit_a_response_is_as_long_as_what_remains(engine: TransformersEngine) -> None:
    lengths = [20, 90, 100, 120, 120, 126, 127]
    requests = [Request(" ".join(["apples"] * (length - 1)), i) for i, length in enumerate(lengths)]
    sampling = Sampling(max_tokens=50, temperature=0.8, logprobs=True)
    unbroken = 0
    for request, length, (found,) in zip(requests, lengths, run(engine, requests, sampling), strict=True):
        assert found.tokens_in == length
        if found.finish_reason == "length":
            unbroken += length >= 90
            assert found.tokens_out == min(50, LIMIT - length)
        ((alone,),) = run(engine, [request], sampling)
        assert same(found, alone)
    assert unbroken >= 4


def test_a_row_is_not_cut_by_a_longer_neighbour(model: Any, tokenizer: Any) -> None:
    endless = TransformersEngine(with_settings(model, eos_token_id=1), tokenizer)
    short, long = Request("How many", 1), Request(" ".join(["apples"] * 120), 2)
    for requests in ([short, long], [long, short], [long, short, long, short]):
        found = run(endless, requests, Sampling(max_tokens=40, temperature=0.1))
        assert {len(r.rendered): c.tokens_out for r, (c,) in zip(requests, found, strict=True)} == {8: 40, 839: 7}


def test_the_limit_is_that_of_the_tokenizer_if_lower(model: Any, tokenizer: Any) -> None:
    shorter = copy.deepcopy(tokenizer)
    shorter.model_max_length = 30
    found = TransformersEngine(model, shorter).generate(["apples " * 19, "apples " * 28, "apples " * 29], DRAWN)
    assert [c.refused for (c,) in found] == [False, False, True]
    assert [c.tokens_out for (c,) in found[:2]] == [10, 1]


# Messages


def ask(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def test_messages_go_through_the_chat_template(model: Any, tokenizer: Any) -> None:
    chatty = TransformersEngine(model, with_template(tokenizer, TEMPLATE))
    assert chatty.chat
    turns = ask(("a", "How many"), ("the", "12"), ("a", "and now ?"))
    ((found,), (plain,)) = chatty.generate([turns, "How many"], DRAWN)
    text = "a How many . the 12 . a and now ? . Answer"
    assert found.prompt_ids == tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert plain.prompt_ids == tuple(tokenizer("How many")["input_ids"])
    assert found.logprobs == pytest.approx(at(logprobs_by_hand(model, found), found), abs=1e-4)


def test_chat_may_be_chosen(model: Any, tokenizer: Any) -> None:
    templated = with_template(tokenizer, TEMPLATE)
    assert TransformersEngine(model, templated, chat=False).chat is False
    assert TransformersEngine(model, templated, chat=True).chat is True
    assert TransformersEngine(model, tokenizer).chat is False
    assert TransformersEngine(model, templated).describe()["chat"] is True


def test_messages_without_a_template_are_refused_and_texts_answered(engine: TransformersEngine) -> None:
    found = engine.generate([ask(("user", "How ?")), "How ?", []], DRAWN)
    assert [c.refused for (c,) in found] == [True, False, True]
    assert "no" in (found[0][0].error or "")
    assert "chat template" in (found[0][0].error or "")


def test_a_system_message_stays_where_the_template_takes_it(model: Any, tokenizer: Any) -> None:
    chatty = TransformersEngine(model, with_template(tokenizer, TEMPLATE))
    ((found,),) = chatty.generate([ask(("system", "Work step by step"), ("a", "How many"))], DRAWN)
    text = "system Work step by step . a How many . Answer"
    assert found.prompt_ids == tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_a_system_message_is_merged_where_the_template_refuses_it(model: Any, tokenizer: Any) -> None:
    chatty = TransformersEngine(model, with_template(tokenizer, NO_SYSTEM))
    given = ask(("system", "Work step by step"), ("a", "How many"), ("the", "12"), ("a", "and now ?"))
    before = copy.deepcopy(given)
    alone = ask(("system", "Work step by step"))
    ((found,), (refused,), (last,)) = chatty.generate([given, alone, ask(("a", "How many"))], DRAWN)
    text = "a Work step by step How many . the 12 . a and now ? . Answer"
    assert found.prompt_ids == tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert given == before
    assert refused.refused
    assert "no system, please" in (refused.error or "")
    assert last.text is not None


def test_what_a_template_refuses_is_refused_in_one_line(model: Any, tokenizer: Any) -> None:
    picky = "{% if 'x' in messages[-1]['content'] %}{{ raise_exception('no x\nat all') }}{% endif %}" + TEMPLATE
    chatty = TransformersEngine(model, with_template(tokenizer, picky))
    turns = [ask(("a", "x")), ask(("a", "How")), ask(("system", "How"), ("a", "x"))]
    found = [c for (c,) in chatty.generate(turns, DRAWN)]
    assert [c.refused for c in found] == [True, False, True]
    for one in (found[0], found[2]):
        assert "no x at all" in (one.error or "")


# The model's own settings

SETTINGS: dict[str, Any] = {
    "repetition_penalty": 5.0,
    "top_k": 1,
    "top_p": 0.1,
    "temperature": 0.01,
    "do_sample": True,
    "min_new_tokens": 25,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": [65, 108],
    "bad_words_ids": [[74]],
    "max_new_tokens": 3,
    "num_beams": 2,
}


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_the_model_s_own_settings_are_ignored_and_restored(
    engine: TransformersEngine, model: Any, tokenizer: Any, sampling: Sampling
) -> None:
    other = with_settings(model, **SETTINGS)
    config, before = other.generation_config, other.generation_config.to_dict()
    found = TransformersEngine(other, tokenizer).generate(QUERIES, sampling)
    assert all(same(a, b) for (a,), (b,) in zip(found, engine.generate(QUERIES, sampling), strict=True))
    assert other.generation_config is config
    assert config.to_dict() == before
    ids = torch.tensor([found[0][0].prompt_ids])
    assert other.generate(ids, attention_mask=torch.ones_like(ids)).shape[1] == ids.shape[1] + 3


def test_the_model_s_own_settings_are_restored_after_an_error(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = with_settings(model, **SETTINGS)
    config = other.generation_config

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(other, "forward", fail)
    with pytest.raises(RuntimeError, match="broken"):
        TransformersEngine(other, tokenizer).generate(QUERIES[:1], DRAWN)
    assert other.generation_config is config


def test_all_end_tokens_of_the_model_end_a_response(engine: TransformersEngine, model: Any, tokenizer: Any) -> None:
    equals, stop = tokenizer.convert_tokens_to_ids(["=", "."])
    several = TransformersEngine(with_settings(model, eos_token_id=[END, stop, equals]), tokenizer)
    seen = set()
    for (full,), (found,) in zip(engine.generate(QUERIES, DRAWN), several.generate(QUERIES, DRAWN), strict=True):
        assert full.token_ids is not None
        n = next((k + 1 for k, t in enumerate(full.token_ids) if t in (END, stop, equals)), 32)
        assert found.token_ids == full.token_ids[:n]
        assert found.logprobs == pytest.approx((full.logprobs or ())[:n], abs=1e-4)
        assert found.finish_reason == ("stop" if n < 32 else full.finish_reason)
        seen.add(found.token_ids[-1])
    assert {END, equals} <= seen


def test_an_end_token_is_no_part_of_the_text_whatever_the_tokenizer_calls_it(model: Any, tokenizer: Any) -> None:
    """Some models end turns with tokens that their tokenizers do not list as special."""
    equals = tokenizer.convert_tokens_to_ids("=")
    ((found,),) = TransformersEngine(with_settings(model, eos_token_id=[END, equals]), tokenizer).generate(
        [PLATES], GREEDY
    )
    assert found.token_ids[-1] == equals
    assert found.text == "37 - 6"


def test_the_tokens_of_a_response_are_those_that_were_sampled(model: Any, tokenizer: Any) -> None:
    """Of several end tokens a response is ended by the tokenizer's, as turns of a chat are."""
    engine = TransformersEngine(with_settings(model, eos_token_id=[1, END]), tokenizer)
    ((found,),) = engine.generate([PLATES], GREEDY)
    assert engine.response_tokens(REPLY, ended=True) == list(found.token_ids or ())
    assert engine.response_tokens(REPLY, ended=False) == list(found.token_ids or ())[:-1]


def test_a_model_without_an_end_goes_on(model: Any, tokenizer: Any) -> None:
    endless, bare = with_settings(model, eos_token_id=None), copy.deepcopy(tokenizer)
    bare.eos_token = bare.pad_token = None
    engine = TransformersEngine(endless, bare)
    assert {(c.finish_reason, c.tokens_out) for (c,) in engine.generate(QUERIES, Sampling(30))} == {("length", 30)}
    found = engine.generate(QUERIES, Sampling(30, stop=("=", ".")))
    assert any(c.finish_reason == "stop" for (c,) in found)
    for (c,) in found:
        text = bare.decode(c.token_ids[:-1], skip_special_tokens=True)
        assert c.finish_reason == "length" or not any(s in text for s in "=.")


def test_a_tokenizer_without_padding(engine: TransformersEngine, model: Any, tokenizer: Any) -> None:
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    assert bare.pad_token_id is None
    for sampling in (DRAWN, Sampling(32, stop=("=", ". The"), logprobs=True)):
        found = TransformersEngine(model, bare).generate(QUERIES, sampling)
        assert all(same(a, b) for (a,), (b,) in zip(found, engine.generate(QUERIES, sampling), strict=True))
    pairs = [(c.prompt_ids, c.token_ids) for (c,) in found]
    assert TransformersEngine(model, bare).score(*zip(*pairs, strict=True)) == [
        pytest.approx(c.logprobs, abs=1e-4) for (c,) in found
    ]


def test_a_tokenizer_that_ends_texts(engine: TransformersEngine, model: Any, tokenizer: Any) -> None:
    """The end-of-text token that some tokenizers put after a text would tell the model that all is said."""
    from tokenizers.processors import TemplateProcessing

    ending = copy.deepcopy(tokenizer)
    ending.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", END)]
    )
    assert ending("How ?")["input_ids"][-1] == END
    found = TransformersEngine(model, ending).generate(QUERIES, DRAWN)
    assert all(same(a, b) for (a,), (b,) in zip(found, engine.generate(QUERIES, DRAWN), strict=True))


def test_a_static_cache_changes_nothing(engine: TransformersEngine, model: Any, tokenizer: Any) -> None:
    static = TransformersEngine(model, tokenizer, static_cache=True, batch_size=4)
    found = static.generate(QUERIES, DRAWN)
    assert all(same(a, b) for (a,), (b,) in zip(found, engine.generate(QUERIES, DRAWN), strict=True))


# Scoring


def test_scores_are_the_logprobs_of_given_tokens(model: Any, tokenizer: Any) -> None:
    prompts = [tuple(tokenizer(q)["input_ids"]) for q in QUERIES[:5]]
    said = [(65, 12, END), (5,), (), (108, 120, 181, 30, 69, END, 9), tuple(range(4, 60))]
    found = TransformersEngine(model, tokenizer, batch_size=2).score(prompts, said)
    assert [len(row) for row in found] == [3, 1, 0, 7, 56]
    for prompt, tokens, row in zip(prompts, said, found, strict=True):
        if tokens:
            one = Completion("", token_ids=tokens, prompt_ids=prompt)
            assert row == pytest.approx(at(logprobs_by_hand(model, one), one), abs=1e-4)
    assert TransformersEngine(model, tokenizer).score([], []) == []


@pytest.mark.parametrize("how", [{"temperature": 0.7}, {"top_p": 0.6}, {"top_k": 7}, {"top_k": 1}, {}])
def test_scores_of_a_draw_are_its_processed_logprobs(model: Any, tokenizer: Any, how: dict[str, Any]) -> None:
    engine = TransformersEngine(model, tokenizer, batch_size=3, logprobs_mode="processed")
    sampling = Sampling(max_tokens=30, logprobs=True, **how)
    found = [c for (c,) in engine.generate(QUERIES[:6], sampling)]
    scores = engine.score_drawn([c.prompt_ids for c in found], [c.token_ids for c in found], sampling)
    for one, row in zip(found, scores, strict=True):
        assert row == pytest.approx(one.logprobs, abs=1e-3)


def test_scores_of_a_greedy_draw_are_those_of_the_model(engine: TransformersEngine) -> None:
    assert engine.score_drawn([(1, 89)], [(192, 5)], GREEDY) == engine.score([(1, 89)], [(192, 5)])


# Adapters, shared models, weights


def test_an_adapter_changes_what_is_generated_as_in_peft(engine: TransformersEngine, adapter: Path) -> None:
    from peft import PeftModel

    adapted = TransformersEngine(BASE, adapter=str(adapter), device="cpu")
    by_peft = PeftModel.from_pretrained(load_language_model(BASE), str(adapter)).eval()
    found, plain = adapted.generate(QUERIES, GREEDY), engine.generate(QUERIES, GREEDY)
    assert sum(a.token_ids != b.token_ids for (a,), (b,) in zip(found, plain, strict=True)) > len(QUERIES) / 2
    for (one,) in found:
        ids = torch.tensor([one.prompt_ids])
        out = by_peft.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=GREEDY.max_tokens
        )
        assert list(one.token_ids or ()) == out[0, ids.shape[1] :].tolist()
        assert one.logprobs == pytest.approx(at(logprobs_by_hand(by_peft, one), one), abs=1e-4)
    told = adapted.describe()
    assert BASE in told["model"]
    assert str(adapter) in told["model"]


@pytest.mark.parametrize(("modules", "embeddings"), [(["q_proj"], True), (["q_proj", "lm_head"], False)])
def test_an_adapter_may_be_saved_with_the_embeddings_or_without(
    tmp_path: Path, tokenizer: Any, modules: list[str], embeddings: bool
) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=modules, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(load_language_model(BASE), config)
    adapted.save_pretrained(tmp_path / "one", save_embedding_layers=embeddings)
    found = TransformersEngine(BASE, adapter=str(tmp_path / "one"), device="cpu").generate(QUERIES[:3], GREEDY)
    expected = TransformersEngine(adapted, tokenizer).generate(QUERIES[:3], GREEDY)
    assert all(same(a, b) for (a,), (b,) in zip(found, expected, strict=True))


@pytest.mark.parametrize("own", [False, True], ids=["of the base", "of its own"])
def test_a_shared_model_with_adapters_keeps_its_settings(adapter: Path, tokenizer: Any, own: bool) -> None:
    from peft import PeftModel

    shared = PeftModel.from_pretrained(load_language_model(BASE), str(adapter))
    inner = shared.get_base_model()
    if own:
        shared.generation_config = copy.deepcopy(inner.generation_config)
    for name, value in SETTINGS.items():
        setattr(shared.generation_config, name, value)
    configs = [shared.generation_config, inner.generation_config]
    before = [config.to_dict() for config in configs]
    engine = TransformersEngine(shared, tokenizer)
    alone = TransformersEngine(BASE, adapter=str(adapter), device="cpu")
    for sampling in (GREEDY, DRAWN):
        found = engine.generate(QUERIES[:4], sampling)
        assert all(same(a, b) for (a,), (b,) in zip(found, alone.generate(QUERIES[:4], sampling), strict=True))
    assert shared.generation_config is configs[0]
    assert inner.generation_config is configs[1]
    assert [config.to_dict() for config in configs] == before
    with shared.disable_adapter():
        plain = engine.generate(QUERIES[:4], GREEDY)
    expected = TransformersEngine(load_language_model(BASE), tokenizer).generate(QUERIES[:4], GREEDY)
    assert ids_and_text(plain) == ids_and_text(expected)


def test_a_shared_model_is_as_it_is_trained(engine: TransformersEngine, model: Any, tokenizer: Any) -> None:
    mine = copy.deepcopy(model)
    shared = TransformersEngine(mine, tokenizer)
    before = shared.generate(QUERIES, DRAWN)
    assert all(same(a, b) for (a,), (b,) in zip(before, engine.generate(QUERIES, DRAWN), strict=True))
    mine.train()
    optimizer = torch.optim.SGD(mine.parameters(), lr=0.5)
    ids = torch.tensor([tokenizer(QUERIES[0])["input_ids"]])
    mine(input_ids=ids, labels=ids).loss.backward()  # what was made in inference mode would stop here
    optimizer.step()
    after = shared.generate(QUERIES, DRAWN)
    assert ids_and_text(after) != ids_and_text(before)
    for (found,) in after:
        assert found.logprobs == pytest.approx(at(logprobs_by_hand(mine, found), found), abs=1e-4)
    scores = shared.score([c.prompt_ids for (c,) in after], [c.token_ids for (c,) in after])
    assert scores == [pytest.approx(c.logprobs, abs=1e-4) for (c,) in after]


def test_dropout_is_off_while_generating_and_scoring(model: Any, tokenizer: Any) -> None:
    mine = copy.deepcopy(model)
    for layer in mine.model.layers:
        layer.self_attn.attention_dropout = 0.5
    expected = TransformersEngine(model, tokenizer).generate(QUERIES[:4], DRAWN)
    shared = TransformersEngine(mine.train(), tokenizer)
    found = shared.generate(QUERIES[:4], DRAWN)
    assert all(same(a, b) for (a,), (b,) in zip(found, expected, strict=True))
    scores = shared.score([c.prompt_ids for (c,) in found], [c.token_ids for (c,) in found])
    assert scores == [pytest.approx(c.logprobs, abs=1e-4) for (c,) in found]


@pytest.mark.parametrize("training", [True, False])
def test_a_shared_model_is_left_in_the_mode_it_was_in(model: Any, tokenizer: Any, training: bool) -> None:
    """Else the next step of a training would run without dropout."""
    mine = copy.deepcopy(model).train(training)
    shared = TransformersEngine(mine, tokenizer)
    shared.generate(["How ?"], Sampling(2))
    assert mine.training is training
    shared.score([(1, 89)], [(75,)])
    assert mine.training is training


def probe_of(model: Any, threshold: float = 1e-3) -> Probe:
    one = Completion("", token_ids=(20, 249, 65, END), prompt_ids=(1, 89, 192, 75))
    return Probe([one.prompt_ids or ()], [one.token_ids or ()], [at(logprobs_by_hand(model, one), one)], threshold)


def perturbed(model: Any, size: float = 0.05) -> Any:
    made = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return made


def test_new_weights_are_taken_and_proved(model: Any, tokenizer: Any) -> None:
    engine, new = TransformersEngine(copy.deepcopy(model), tokenizer), perturbed(model)
    before = engine.generate(QUERIES[:4], DRAWN)
    assert engine.weight_version == 0
    assert engine.update_weights(new.named_parameters(), probe_of(new)) == 1
    assert engine.weight_version == 1
    found = engine.generate(QUERIES[:4], DRAWN)
    assert ids_and_text(found) != ids_and_text(before)
    expected = TransformersEngine(new, tokenizer).generate(QUERIES[:4], DRAWN)
    assert all(same(a, b) for (a,), (b,) in zip(found, expected, strict=True))


def test_weights_that_are_not_those_of_the_probe_are_an_error(model: Any, tokenizer: Any) -> None:
    engine, new = TransformersEngine(copy.deepcopy(model), tokenizer), perturbed(model)
    with pytest.raises(EngineError, match="not those that were sent"):
        engine.update_weights(model.named_parameters(), probe_of(new))
    with pytest.raises(EngineError, match="not those that were sent"):
        engine.check_weights(probe_of(new))
    assert engine.check_weights(probe_of(model)) < 1e-5


def test_weights_of_another_model_are_an_error(model: Any, tokenizer: Any) -> None:
    engine, given = TransformersEngine(copy.deepcopy(model), tokenizer), dict(model.named_parameters())
    name = next(iter(given))
    less, other = {k: v for k, v in given.items() if k != name}, given | {name: given[name][:-1]}
    for weights in (less, given | {"new": given[name]}, other):
        with pytest.raises(EngineError) as e:
            engine.update_weights(weights.items(), probe_of(model))
        assert "\n" not in str(e.value)
    assert engine.weight_version == 0


def test_new_weights_of_a_model_whose_embeddings_are_tied(model: Any, tokenizer: Any) -> None:
    """The parameters of such a model hold the shared one under one name only."""
    tied = perturbed(model, 0.0)
    tied.config.tie_word_embeddings = True
    tied.lm_head.weight = tied.model.embed_tokens.weight
    new = perturbed(tied)
    assert "lm_head.weight" not in dict(new.named_parameters())
    engine = TransformersEngine(tied, tokenizer)
    assert engine.update_weights(new.named_parameters(), probe_of(new)) == 1


def test_new_weights_do_not_go_under_the_fingerprint_of_the_old(model: Any) -> None:
    with TransformersEngine(BASE, device="cpu") as engine:
        before, new = engine.describe()["model_fingerprint"], perturbed(model)
        engine.update_weights(new.named_parameters(), probe_of(new))
        assert before
        assert engine.describe()["model_fingerprint"] != before


def test_a_shared_model_outlives_the_engine(model: Any, tokenizer: Any) -> None:
    with TransformersEngine(model, tokenizer) as one:
        before = one.generate(QUERIES[:2], DRAWN)
    again = TransformersEngine(model, tokenizer).generate(QUERIES[:2], DRAWN)
    assert all(same(a, b) for (a,), (b,) in zip(before, again, strict=True))


def test_the_end_of_a_with_block_lets_go_of_the_model(tokenizer: Any) -> None:
    mine = load_language_model(BASE)
    gone = weakref.ref(mine)
    engine = TransformersEngine(mine, tokenizer)

    def fail() -> None:
        with engine:
            assert engine.generate(["How ?"], Sampling(2))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    del mine
    gc.collect()
    assert gone() is None
    engine.close()  # twice is no error


def fingerprint(folder: Path, adapter: Path | None = None) -> str:
    with TransformersEngine(str(folder), adapter=None if adapter is None else str(adapter), device="cpu") as engine:
        return engine.describe()["model_fingerprint"]


def nudge(file: Path) -> None:
    """Change one number of the last tensor by as little as it can."""
    tensors = load_file(file)
    flat = tensors[sorted(tensors)[-1]].view(-1)
    flat[-1] = torch.nextafter(flat[-1], torch.tensor(9.0))
    save_file(tensors, file, metadata={"format": "pt"})


def test_the_fingerprint_is_that_of_the_content(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        shutil.copytree(BASE, tmp_path / name)
    nudge(tmp_path / "b" / "model.safetensors")
    file = tmp_path / "c" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": TEMPLATE}))
    assert fingerprint(tmp_path / "a") == fingerprint(Path(BASE))
    assert len({fingerprint(tmp_path / name) for name in "abc"}) == 3


def test_the_fingerprint_is_also_that_of_the_adapter(tmp_path: Path, adapter: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(adapter, tmp_path / name)
    nudge(tmp_path / "b" / "adapter_model.safetensors")
    base = fingerprint(Path(BASE))
    same_, other = (fingerprint(Path(BASE), tmp_path / name) for name in ("a", "b"))
    assert same_ == fingerprint(Path(BASE), adapter)
    assert len({base, same_, other}) == 3


def test_what_an_engine_says_of_itself(engine: TransformersEngine) -> None:
    import transformers

    with TransformersEngine(BASE, device="cpu") as named:
        told = named.describe()
    assert json.loads(json.dumps(told)) == told
    assert told["engine"] == "transformers"
    assert told["engine_version"] == transformers.__version__
    assert (told["model"], told["dtype"], told["device"], told["chat"]) == (BASE, "float32", "cpu", False)
    assert engine.describe()["model_fingerprint"] is None  # its weights may change
    assert named.model == BASE


def test_another_number_type(model: Any) -> None:
    with TransformersEngine(BASE, dtype="bfloat16", device="cpu") as half:
        assert half.describe()["dtype"] == "bfloat16"
        found = half.generate(QUERIES[:4], DRAWN)
    gaps = [x - y for (c,) in found for x, y in zip(c.logprobs, at(logprobs_by_hand(model, c), c), strict=True)]
    assert 1e-5 < np.abs(gaps).mean() < 0.05


def test_a_paused_engine_draws_nothing_until_it_is_resumed(model: Any, tokenizer: Any) -> None:
    engine = TransformersEngine(model, tokenizer)
    before = engine.generate(QUERIES[:2], DRAWN)
    engine.pause()
    paused = r"^the engine 'transformers' is paused; resume it first$"
    requests = [Request(query, i) for i, query in enumerate(QUERIES[:3])]
    with pytest.raises(EngineError, match=paused):
        engine.generate(QUERIES[:2], DRAWN)
    with pytest.raises(EngineError, match=paused):
        list(engine.stream(requests, DRAWN))
    engine.resume()
    by_one = TransformersEngine(model, tokenizer, batch_size=1)
    stream = by_one.stream(requests, DRAWN)
    next(stream)
    by_one.pause()
    with pytest.raises(EngineError, match=paused):
        next(stream)
    assert all(same(a, b) for (a,), (b,) in zip(engine.generate(QUERIES[:2], DRAWN), before, strict=True))


# What is not allowed


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"batch_size": 0}, "batch_size = 0.*1 or more"),
        ({"batch_size": "many"}, "batch_size = many.*a whole number"),
        ({"batch_size": 2.5}, "2.5"),
        ({"logprobs_mode": "cooked"}, "logprobs_mode = 'cooked'.*raw, processed"),
        ({"dtype": "int8"}, "dtype = 'int8'.*auto, float32, bfloat16, float16"),
        ({"device": "nowhere"}, "device = 'nowhere'"),
        ({"device": "cuda:93"}, "device = 'cuda:93'"),
        ({"adapter": "/nowhere/at/all"}, "adapter '/nowhere/at/all'"),
        ({"batchsize": 4}, "no parameter 'batchsize'.*did you mean 'batch_size'"),
        ({"model": "other"}, "--model"),
    ],
)
def test_wrong_parameters_are_one_line(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as e:
        open_engine("transformers", BASE, params)
    assert "\n" not in str(e.value)


def test_a_model_that_is_not_there_or_no_model_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    for folder in (tmp_path / "nowhere", tmp_path, tmp_path / "other"):
        with pytest.raises(ConfigError, match="cannot load the language model") as e:
            open_engine("transformers", str(folder))
        assert "\n" not in str(e.value)
        assert str(folder) in str(e.value)


@pytest.mark.parametrize("damage", ["config", "weights", "rank", "cut", "no weights"])
def test_an_adapter_that_cannot_be_loaded_is_one_line(damage: str, tmp_path: Path, adapter: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(adapter, folder)
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if damage == "config":
        config.write_text("{}")
    elif damage == "weights":
        weights.write_bytes(b"")
    elif damage == "rank":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 8}))
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-9])
    else:
        weights.unlink()
    with pytest.raises(ConfigError, match="cannot load the adapter") as e:
        open_engine("transformers", BASE, {"adapter": str(folder)})
    assert "\n" not in str(e.value)
    assert str(folder) in str(e.value)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_an_adapter_whose_weights_are_none_of_the_model_s_is_refused(tmp_path: Path, adapter: Path) -> None:
    """PEFT says a warning and goes on with the adapter's random start, which would run under the adapter's name."""
    folder = tmp_path / "other"
    shutil.copytree(adapter, folder)
    file = folder / "adapter_model.safetensors"
    save_file({f"elsewhere.{name}": value for name, value in load_file(file).items()}, file)
    with pytest.raises(ConfigError, match="cannot load the adapter"):
        open_engine("transformers", BASE, {"adapter": str(folder)})


def test_unknown_engines_and_things_that_are_none(engine: TransformersEngine) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'transformers'"):
        open_engine("transformer", BASE)
    for name in ("json:loads", "oirl.logs.costs:nothing", "oirl.engines.base:Sampling"):
        with pytest.raises(OirlError):
            open_engine(name, BASE)
    with pytest.raises(ConfigError, match="is no engine"):
        open_engine(f"{__name__}:not_an_engine", BASE)
    with pytest.raises(ConfigError, match="tokenizer"):
        TransformersEngine(load_language_model(BASE))


def not_an_engine(model: str) -> str:
    return model


def test_open_engine_gives_the_engine_with_its_parameters() -> None:
    with open_engine("transformers", BASE, {"batch_size": 2, "device": "cpu", "chat": True}) as made:
        assert isinstance(made, TransformersEngine)
        assert made.chat is True
        assert made.generate(["How ?"], Sampling(2))[0][0].text
    path = "oirl.engines.transformers_engine:TransformersEngine"
    with open_engine(path, BASE, {"device": "cpu"}) as made:
        assert isinstance(made, TransformersEngine)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"n": 0}, "n"),
        ({"stop": "."}, "stop"),
        ({"stop": ("a", "")}, "stop"),
    ],
)
def test_settings_of_a_draw_that_are_not_allowed(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} = .*allowed"):
        Sampling(**settings)


def test_derived_seeds_depend_on_all_parts() -> None:
    parts = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), ("0", "1", ""), (11,), (1, 1), ("\ud800",)]
    seeds = [derive_seed(*p) for p in parts]
    assert len(set(seeds)) == len(parts)
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert seeds == [derive_seed(*p) for p in parts]
    many = [derive_seed("x", i) for i in range(4000)]
    assert len(set(many)) == 4000
    assert max(many) > 2**30 > min(many)


# Streams


def forever(taken: list[int]) -> Iterator[Request]:
    for i in itertools.count():
        taken.append(i)
        assert i < 10_000, "requests are taken without end"
        yield Request(QUERIES[i % len(QUERIES)], i)


@pytest.mark.parametrize(("batch_size", "n"), [(1, 1), (4, 1), (4, 3), (1, 20)])
def test_a_stream_takes_few_requests_ahead_and_may_be_left(model: Any, tokenizer: Any, batch_size: int, n: int) -> None:
    taken: list[int] = []
    parts = TransformersEngine(model, tokenizer, batch_size=batch_size)
    stream = parts.stream(forever(taken), Sampling(3, n=n))
    assert taken == []
    got = [next(stream) for _ in range(5)]
    assert len({position for position, _ in got}) == 5
    assert all(len(completions) == n for _, completions in got)
    assert len(taken) <= 5 + max(32 * batch_size // n, 1)
    stream.close()
    before = len(taken)
    assert list(stream) == []
    assert len(taken) == before
    assert parts.generate(["How ?"], Sampling(2))[0][0].text is not None  # the engine goes on


def test_a_long_stream_yields_every_position_once(model: Any, tokenizer: Any) -> None:
    parts = TransformersEngine(model, tokenizer, batch_size=2)
    texts = [QUERIES[i % 10] if i % 7 else "apples " * 200 for i in range(90)]
    requests = [Request(text, i) for i, text in enumerate(texts)]
    found = run(parts, requests, Sampling(2, n=2))
    for text, completions in zip(texts, found, strict=True):
        assert [c.refused for c in completions] == [len(text) > 1000] * 2
        assert completions[0].refused or completions[0].prompt_ids == tuple(tokenizer(text)["input_ids"])


def test_an_error_of_the_requests_is_not_swallowed(engine: TransformersEngine) -> None:
    def broken() -> Iterator[Request]:
        yield Request("How ?", 1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(engine.stream(broken(), DRAWN))


def full_above(model: Any, rows: int, seen: list[int]) -> Any:
    """Return a copy of the model that says that memory does not suffice for more than so many rows."""
    made = copy.deepcopy(model)
    generate = made.generate

    def limited(**options: Any) -> Any:
        seen.append(len(options["input_ids"]))
        if len(options["input_ids"]) > rows:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return generate(**options)

    made.generate = limited
    return made


def test_where_memory_does_not_suffice_batches_are_halved(
    engine: TransformersEngine, model: Any, tokenizer: Any
) -> None:
    seen: list[int] = []
    small = TransformersEngine(full_above(model, 3, seen), tokenizer, batch_size=8)
    found = small.generate(QUERIES, DRAWN)
    assert all(same(a, b) for (a,), (b,) in zip(found, engine.generate(QUERIES, DRAWN), strict=True))
    assert sum(n > 3 for n in seen) <= 3  # eight, and four of them twice: then it remembers
    assert max(seen) == 8


def test_where_memory_suffices_for_no_row_it_is_an_error_of_the_item(model: Any, tokenizer: Any) -> None:
    found = TransformersEngine(full_above(model, 0, []), tokenizer).generate(QUERIES[:3], DRAWN)
    assert all(c.text is None and "memory" in (c.error or "") for (c,) in found)


def test_an_engine_that_cannot_score_says_so() -> None:
    class Mute(Engine):
        name, model, chat = "mute", "none", False

        def stream(self, requests: Any, sampling: Sampling) -> Iterator[tuple[int, list[Completion]]]:
            yield from ()

        def describe(self) -> dict[str, Any]:
            return {}

    with pytest.raises(EngineError, match="mute"), Mute() as mute:
        mute.score([[1]], [[2]])
