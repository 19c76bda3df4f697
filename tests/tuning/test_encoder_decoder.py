"""Encoder-decoder models: drawing, scoring, losses and runs, on tiny ones with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_runs import RELABEL, make_queries, quick, write_queries, write_small_log

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import oirl  # noqa: E402
from oirl.engines.base import Probe, Sampling  # noqa: E402
from oirl.engines.transformers_engine import TransformersEngine  # noqa: E402
from oirl.tuning import heads  # noqa: E402
from oirl.tuning.examples import Example  # noqa: E402
from oirl.tuning.heads import head_is_all  # noqa: E402
from oirl.tuning.trainer import Objective, collate, loss_sums  # noqa: E402
from oirl_data import small_lm_path  # noqa: E402

TEXTS = ["Anna has 3 apples.", "Ben had 20 books, then lost 5. How many books does Ben still have?", "How many?"]


def make(kind: str, seed: int = 0) -> tuple[Any, Any]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(small_lm_path())
    ids = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0, "vocab_size": len(tokenizer)}
    torch.manual_seed(seed)
    if kind == "t5":
        config = transformers.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0, **ids)
        model = transformers.T5ForConditionalGeneration(config)
    else:
        config = transformers.BartConfig(
            d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=128, dropout=0.0, bos_token_id=1,
            forced_eos_token_id=None, **ids,
        )  # fmt: skip
        model = transformers.BartForConditionalGeneration(config)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.15)
    return model.eval(), tokenizer


@pytest.fixture(params=["t5", "bart"])
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return make(request.param)


def logprobs_by_hand(model: Any, source: list[int], response: list[int]) -> list[float]:
    """Return log-probs one row at a time, without padding."""
    decoder = torch.tensor([[model.config.decoder_start_token_id, *response[:-1]]])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([source]), decoder_input_ids=decoder).logits[0].float()
    return torch.log_softmax(logits, -1)[range(len(response)), response].tolist()


def test_what_is_drawn_has_the_log_probs_of_a_plain_pass(pair: tuple[Any, Any]) -> None:
    model, tokenizer = pair
    engine = TransformersEngine(model, tokenizer)
    for (drawn,), text in zip(engine.generate(TEXTS, Sampling(max_tokens=12, logprobs=True)), TEXTS, strict=True):
        assert drawn.prompt_ids == tuple(tokenizer(text)["input_ids"])
        expected = logprobs_by_hand(model, list(drawn.prompt_ids), list(drawn.token_ids or ()))
        assert drawn.logprobs == pytest.approx(expected, abs=1e-4)
        assert len(drawn.token_ids or ()) == 12 or (drawn.token_ids or ())[-1] == 2


def test_a_response_does_not_depend_on_its_neighbours(pair: tuple[Any, Any]) -> None:
    alone, together = (TransformersEngine(*pair, batch_size=size) for size in (1, 3))
    found = [[c.token_ids for (c,) in engine.generate(TEXTS, Sampling(max_tokens=8))] for engine in (alone, together)]
    assert found[0] == found[1]


def test_given_tokens_are_scored_and_weights_taken(pair: tuple[Any, Any]) -> None:
    model, tokenizer = pair
    engine = TransformersEngine(model, tokenizer)
    prompts, tokens = [[1, 5, 6, 7, 9], [1, 8]], [[9, 10], [11, 12, 13, 2]]
    expected = [logprobs_by_hand(model, p, t) for p, t in zip(prompts, tokens, strict=True)]
    for row, wanted in zip(engine.score(prompts, tokens), expected, strict=True):
        assert row == pytest.approx(wanted, abs=1e-4)
    other, _ = make(model.config.model_type, seed=1)
    probe = Probe(prompts, tokens, [logprobs_by_hand(other, p, t) for p, t in zip(prompts, tokens, strict=True)], 1e-3)
    assert engine.update_weights(other.state_dict().items(), probe) == 1


@torch.no_grad()
@pytest.mark.parametrize("chunk", [100, 1 << 25])
def test_losses_are_those_of_rows_alone(pair: tuple[Any, Any], chunk: int, monkeypatch: Any) -> None:
    model, _ = pair
    whole = not head_is_all(model)
    assert whole == (model.config.model_type == "bart")  # which adds a bias to what its head says
    monkeypatch.setattr(heads, "_CHUNK", chunk)
    examples = [
        Example([1, 5, 6, 7], [9, 10, 2], others=([1, 8],)),
        Example([1, 5], [11, 12, 13, 14, 2], given=2, others=([1, 9, 9, 9],)),
    ]
    sums = loss_sums(
        model, collate(examples, 0, "opposite", 0), Objective(0.0, "opposite", 1.0, 0.01), whole_logits=whole
    )
    own = [sum(logprobs_by_hand(model, e.context, e.response)[e.given :]) for e in examples]
    other = [sum(logprobs_by_hand(model, e.others[0], e.response)[e.given :]) for e in examples]
    assert float(sums.supervised) == pytest.approx(-sum(own), rel=1e-4)
    contrast = [torch.logsumexp(torch.tensor([a, b]), 0).item() - a for a, b in zip(own, other, strict=True)]
    assert float(sums.contrastive) == pytest.approx(sum(contrast), rel=1e-3)
    assert float(sums.tokens) == 3 + 3


@torch.no_grad()
def test_the_loss_of_an_update_is_that_of_transformers(pair: tuple[Any, Any]) -> None:
    model, _ = pair
    examples = [Example([1, 5, 6, 7], [9, 10, 2]), Example([1, 5], [11, 12, 13, 14, 2])]
    batch = collate(examples, 0, "none", 0)
    sources, responses = batch["attention_mask"], batch["decoder_input_ids"]
    assert batch["size"] == sources.numel() + responses.numel() - len(examples)  # the start token is not read
    assert batch["read"] == int(sources.sum()) + sum(len(e.response) for e in examples)
    sums = loss_sums(model, batch, Objective(), whole_logits=not head_is_all(model))
    labels = torch.tensor([[9, 10, 2, -100, -100], [11, 12, 13, 14, 2]])
    theirs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
    assert float(sums.supervised / sums.tokens) == pytest.approx(float(theirs), rel=1e-4)
    assert int((batch["labels"][:, 1:] != -100).sum()) == int(sums.tokens)  # what the Trainer counts


@pytest.fixture
def saved(tmp_path: Path) -> str:
    model, tokenizer = make("t5")
    model.save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    return str(tmp_path / "t5")


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_hir_of_a_log_and_of_what_is_sampled(saved: str, lora_rank: int, tmp_path: Path) -> None:
    log = write_small_log(tmp_path / "log.parquet", 12)
    told: list[dict[str, Any]] = []
    offline = quick(tmp_path / "offline", model=saved, log=log, relabel=RELABEL, epochs=6, learning_rate=1e-2)
    report = oirl.tune("hir", offline | {"lora_rank": lora_rank, "suboutputs": 1}, progress=told.append)
    losses = [row["supervised"] for row in told if row["kind"] == "update"]
    assert losses[-1] < losses[0]
    assert report.after["loss"] < report.before["loss"]
    queries = write_queries(make_queries(8), tmp_path / "queries.jsonl")
    # A model of random weights is never right.
    relabel = {"name": "format", "pattern": ".", "matching": RELABEL["correct"], "other": RELABEL["wrong"]}
    online = quick(tmp_path / "online", model=saved, queries=queries, relabel=relabel, iterations=2, samples=2)
    report = oirl.tune("hir", online | {"lora_rank": lora_rank, "max_tokens": 8})
    assert [row["responses"] for row in report.iterations] == [12, 12]
    with oirl.open_engine("transformers", saved if lora_rank else report.model) as engine:
        assert engine.generate(TEXTS[:1], Sampling(max_tokens=4))[0][0].error is None
    lines = (tmp_path / "online" / "model" / "trained_prompts.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["prompt"] == RELABEL["correct"].replace("{prompt}", "{query}")
