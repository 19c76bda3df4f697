"""Losses without all logits in memory are those with them, and their gradients too."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from oirl.tuning import heads  # noqa: E402
from oirl.tuning.examples import Example  # noqa: E402
from oirl.tuning.heads import head_is_all  # noqa: E402
from oirl.tuning.trainer import Objective, collate, loss_sums  # noqa: E402

EXAMPLES = [
    Example([1, 2, 3], [4, 5, 6, 7], others=([1, 9],)),
    Example([3], [8, 9], given=1, others=([2, 2, 2],)),
    Example([5, 5, 5, 5], [6], others=([7],)),
]
SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
FULL = Objective(0.1, "opposite", 0.5, 0.01)


def make(name: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SMALL | changes)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return model.eval()


def loss_and_gradients(model: Any, objective: Objective, *, whole: bool) -> tuple[float, list[Any]]:
    model.zero_grad()
    sums = loss_sums(model, collate(EXAMPLES, 0, objective.contrastive), objective, whole_logits=whole)
    loss = sums.supervised + objective.contrastive_coef * sums.contrastive + sums.negative_entropy
    loss.backward()
    return loss.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk", [1, 170, 1 << 25])
def test_parts_give_the_loss_and_gradient_of_the_whole(tied: bool, chunk: int, monkeypatch: Any) -> None:
    model = make("Llama", tie_word_embeddings=tied)
    whole, expected = loss_and_gradients(model, FULL, whole=True)
    monkeypatch.setattr(heads, "_CHUNK", chunk)
    loss, found = loss_and_gradients(model, FULL, whole=False)
    assert loss == pytest.approx(whole, rel=1e-5)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_head_is_as_it_was_afterwards() -> None:
    model = make("Llama")
    ids = torch.tensor([[1, 2, 3]])
    before = model(ids).logits
    loss_and_gradients(model, FULL, whole=False)
    assert "forward" not in model.get_output_embeddings().__dict__
    assert torch.equal(model(ids).logits, before)


def test_an_error_within_leaves_the_head_as_it_was() -> None:
    model = make("Llama")
    broken = collate(EXAMPLES, 0, "none") | {"row": torch.tensor([99])}
    with pytest.raises((IndexError, RuntimeError)):
        loss_sums(model, broken, Objective())
    assert "forward" not in model.get_output_embeddings().__dict__


@pytest.mark.parametrize(
    ("name", "changes", "all_of_it"),
    [
        ("Llama", {}, True),
        ("Qwen2", {}, True),
        ("Granite", {"logits_scaling": 8.0}, False),
        ("Cohere", {"logit_scale": 0.0625}, False),
        ("Gemma2", {"final_logit_softcapping": 2.0, "head_dim": 16}, False),
    ],
)
def test_models_that_change_their_logits_are_known(name: str, changes: dict[str, Any], all_of_it: bool) -> None:
    model = make(name, **changes)
    assert head_is_all(model) is all_of_it
    assert "forward" not in model.get_output_embeddings().__dict__


def test_looking_at_the_head_changes_no_mode() -> None:
    model = make("Llama").train()
    model.model.layers[0].eval()
    assert head_is_all(model)
    assert model.training
    assert not model.model.layers[0].training
