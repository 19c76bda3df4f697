"""The loss of a padded micro-batch by one forward pass, held against one row at a time without padding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from oirl.tuning.examples import Example
from oirl.tuning.trainer import IGNORED, Objective, Sums, collate, loss_sums

VOCABULARY = 50
FILL = 0
CLOSE = {"rel": 1e-4, "abs": 1e-4}
OBJECTIVES = [
    Objective(),
    Objective(label_smoothing=0.2, entropy_coef=0.1),
    Objective(contrastive="opposite", contrastive_coef=0.5),
    Objective(contrastive="batch", contrastive_coef=0.5, entropy_coef=0.1),
]
APART = [how for how in OBJECTIVES if how.contrastive != "batch"]


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,  # so that what is predicted depends much on what is read
    )
    return LlamaForCausalLM(config).eval()


def words(rng: np.random.Generator, low: int, high: int) -> list[int]:
    return rng.integers(1, VOCABULARY, rng.integers(low, high)).tolist()


def draw(n: int, seed: int = 0, *, cut: bool = False) -> list[Example]:
    """Return random examples with one to three other contexts each, some cut if so asked."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(n):
        example = Example(words(rng, 1, 9), words(rng, 2, 8), 0, tuple(words(rng, 1, 12) for _ in range(1 + i % 3)))
        found.append(replace(example, given=int(rng.integers(0, len(example.response)))) if cut else example)
    return found


def logprobs_of(model: Any, context: list[int], example: Example) -> torch.Tensor:
    """Return the distributions at the targets of an example after a context, (tokens, vocabulary)."""
    logits = model(input_ids=torch.tensor([[*context, *example.response]])).logits[0].double()
    start, end = len(context) + example.given - 1, len(context) + len(example.response) - 1
    return torch.log_softmax(logits[start:end], dim=-1)


def plain(model: Any, examples: Sequence[Example], how: Objective) -> dict[str, torch.Tensor]:
    """Return the parts of the loss from one row at a time."""
    supervised, contrast, entropy = (torch.zeros((), dtype=torch.float64) for _ in range(3))
    for i, example in enumerate(examples):
        logprobs = logprobs_of(model, example.context, example)
        for row, token in zip(logprobs, example.response[example.given :], strict=True):
            supervised = supervised - (1 - how.label_smoothing) * row[token] - how.label_smoothing * row.mean()
            entropy = entropy + (row.exp() * row).sum()
        contexts = [example.context, *example.others]
        own = 0
        if how.contrastive == "batch":
            contexts, own = [other.context for other in examples], i
        targets = torch.tensor(example.response[example.given :])
        sums = [logprobs_of(model, c, example).gather(1, targets[:, None]).sum() for c in contexts]
        contrast = contrast - torch.log_softmax(torch.stack(sums), dim=0)[own]
    zero = torch.zeros(())
    return {
        "supervised": supervised,
        "contrastive": zero if how.contrastive == "none" else contrast,
        "negative_entropy": entropy if how.entropy_coef else zero,
    }


def sums_of(model: Any, examples: Sequence[Example], how: Objective, fill: int = FILL) -> Sums:
    return loss_sums(model, collate(examples, fill, how.contrastive), how)


def values_of(model: Any, examples: Sequence[Example], how: Objective, fill: int = FILL) -> list[float]:
    with torch.no_grad():
        return [value.item() for value in sums_of(model, examples, how, fill)]


# values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", OBJECTIVES)
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_loss_of_a_batch_is_that_of_its_rows_alone(model: Any, how: Objective, cut: bool, n: int) -> None:
    examples = draw(n, seed=n, cut=cut)
    with torch.no_grad():
        expected = plain(model, examples, how)
        found = sums_of(model, examples, how)
    for name, value in expected.items():
        assert getattr(found, name).item() == pytest.approx(value.item(), **CLOSE), name
    assert found.tokens.item() == sum(len(e.response) - e.given for e in examples)
    assert found.rows.item() == n


@pytest.mark.parametrize("how", OBJECTIVES)
def test_the_gradient_of_a_batch_is_that_of_its_rows_alone(model: Any, how: Objective) -> None:
    examples = draw(4, seed=7, cut=True)

    def gradient(parts: Any) -> torch.Tensor:
        supervised, contrast, entropy = parts
        loss = supervised + how.contrastive_coef * contrast + how.entropy_coef * entropy
        model.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    expected = gradient(plain(model, examples, how).values())
    found = gradient(sums_of(model, examples, how)[:3])
    assert expected.norm() > 1
    assert (found - expected).norm() < 1e-4 * expected.norm()


def test_what_is_given_of_a_response_is_context(model: Any) -> None:
    examples = draw(4, seed=2, cut=True)
    moved = []
    for e in examples:
        given, learned = e.response[: e.given], e.response[e.given :]
        moved.append(Example(e.context + given, learned, 0, tuple(other + given for other in e.others)))
    for how in APART:
        assert values_of(model, examples, how) == pytest.approx(values_of(model, moved, how), **CLOSE)


def test_instructions_that_are_the_same_cannot_be_told_apart(model: Any) -> None:
    rng = np.random.default_rng(4)
    context = words(rng, 3, 9)
    examples = [Example(context, words(rng, 2, 8), others=(context, context)) for _ in range(4)]
    opposite = values_of(model, examples, Objective(contrastive="opposite"))
    assert opposite[1] == pytest.approx(4 * math.log(3), **CLOSE)
    batch = values_of(model, examples, Objective(contrastive="batch"))
    assert batch[1] == 0  # no other to hold it against


# invariances ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", APART)
def test_a_longer_row_beside_them_changes_nothing_for_the_others(model: Any, how: Objective) -> None:
    examples = draw(3, seed=5, cut=True)
    rng = np.random.default_rng(6)
    longer = Example(words(rng, 30, 31), words(rng, 25, 26), 0, (words(rng, 40, 41),))
    alone, extra, both = (values_of(model, rows, how) for rows in (examples, [longer], [*examples, longer]))
    assert both == pytest.approx([a + b for a, b in zip(alone, extra, strict=True)], **CLOSE)


@pytest.mark.parametrize("how", OBJECTIVES)
def test_it_does_not_matter_what_fills_up_rows(model: Any, how: Objective) -> None:
    examples = draw(4, seed=8, cut=True)
    ours, theirs = (values_of(model, examples, how, fill=fill) for fill in (FILL, 31))
    assert ours == pytest.approx(theirs, **CLOSE)


@pytest.mark.parametrize("how", OBJECTIVES)
def test_the_order_of_rows_does_not_matter(model: Any, how: Objective) -> None:
    examples = draw(5, seed=9, cut=True)
    assert values_of(model, examples, how) == pytest.approx(values_of(model, examples[::-1], how), **CLOSE)


def test_the_order_of_other_instructions_does_not_matter(model: Any) -> None:
    how = Objective(contrastive="opposite")
    examples = draw(4, seed=10)
    turned = [replace(e, others=e.others[::-1]) for e in examples]
    assert values_of(model, examples, how) == pytest.approx(values_of(model, turned, how), **CLOSE)


@pytest.mark.parametrize("how", APART)
def test_the_sums_of_micro_batches_add_up(model: Any, how: Objective) -> None:
    examples = draw(7, seed=11, cut=True)
    parts = [values_of(model, examples[i : i + 3], how) for i in range(0, 7, 3)]
    assert values_of(model, examples, how) == pytest.approx([sum(v) for v in zip(*parts, strict=True)], **CLOSE)


# batches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("contrastive", ["none", "opposite", "batch"])
def test_labels_are_the_targets_of_the_examples_alone(contrastive: str) -> None:
    examples = [Example([5, 6], [7, 8, 9], 1, ([1, 2, 3, 4],)), Example([4], [3], 0, ([2, 2],))]
    labels = collate(examples, FILL, contrastive)["labels"]
    assert [[t for t in row if t != IGNORED] for row in labels.tolist()] == [[8, 9], [3]]


def test_a_micro_batch_holds_each_row_once() -> None:
    examples = [Example([5, 6], [7, 8, 9], 1, ([1, 2, 3, 4],)), Example([4], [3], 0, ([2, 2],))]
    first, second = [5, 6, 7, 8, 9, 0, 0], [4, 3, 0, 0, 0, 0, 0]
    assert collate(examples, FILL, "none")["input_ids"].tolist() == [first[:5], second[:5]]
    assert collate(examples, FILL, "opposite")["input_ids"].tolist() == [
        first,
        second,
        [1, 2, 3, 4, 7, 8, 9],
        [2, 2, 3, 0, 0, 0, 0],
    ]
    assert collate(examples, FILL, "batch")["input_ids"].tolist() == [
        first[:5],
        second[:5],
        [4, 7, 8, 9, 0],
        [5, 6, 3, 0, 0],
    ]
