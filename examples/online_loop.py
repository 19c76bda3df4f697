"""The whole loop of advantage-induced policy alignment (APA, 2306.02231) in plain PyTorch, to read from top to bottom.

A small language model answers word problems; a right answer is worth 1. Each iteration draws responses, estimates the
advantage of every token with a value network, and draws log π(token) towards log π_init(token) + advantage / λ. What
`oirl tune apa` adds to this is all that a real run needs: engines, several devices, guards, resume, validation.

Run: python examples/online_loop.py [--iterations 30] [--kl-coef 0.1]
"""

from __future__ import annotations

import argparse
import random

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from oirl.logs.checkers import numeric
from oirl.tuning.advantages import explained_variance, generalised_advantages, standardised
from oirl.tuning.kl import kl_k1
from oirl.tuning.policy_losses import apa_loss, token_weights, value_loss
from oirl.tuning.shaping import at_last_token
from oirl_data import small_lm_path
from oirl_data.problems import Problem, generate_problems

ROLLOUTS, EPOCHS, BATCH, MAX_TOKENS = 64, 2, 32, 64
GAMMA, GAE_LAMBDA = 1.0, 0.95


class Value(nn.Module):
    """V(s): a network of its own, at first the initial policy's body, with a linear head that starts at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.body = AutoModelForCausalLM.from_pretrained(small_lm_path()).model
        self.head = nn.Linear(self.body.config.hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, ids: torch.Tensor, attention: torch.Tensor, width: int) -> torch.Tensor:
        """Return the value before each token of the responses, (n, t)."""
        states = self.body(input_ids=ids, attention_mask=attention).last_hidden_state
        return self.head(states)[:, width - 1 : -1, 0]


def token_logprobs(model: nn.Module, ids: torch.Tensor, attention: torch.Tensor, width: int) -> torch.Tensor:
    """Return log π of each token of the responses, (n, t): that at a place is predicted at the place before."""
    logits = model(input_ids=ids, attention_mask=attention).logits[:, width - 1 : -1]
    return torch.log_softmax(logits, dim=-1).gather(-1, ids[:, width:, None])[..., 0]


def sample(model: nn.Module, tokenizer: AutoTokenizer, queries: list[str]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return token ids (n, width + t), which of them count (1) and are no padding (0), and the width of the prompts."""
    # The tokenizer ends every text with the end-of-text token; a prompt goes on.
    prompts = [tokenizer(query)["input_ids"] for query in queries]
    prompts = [ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids for ids in prompts]
    width = max(map(len, prompts))
    ids = torch.tensor(
        [[0] * (width - len(row)) + row for row in prompts]
    )  # padded on the left: responses begin together
    attention = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    with torch.no_grad():
        out = model.generate(
            input_ids=ids, attention_mask=attention, do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
            max_new_tokens=MAX_TOKENS, pad_token_id=0, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
    response = out[:, width:]
    ended = response == tokenizer.eos_token_id
    before_end = ended.cumsum(1) - ended.long() == 0  # up to the end-of-text token, which counts: the policy chose it
    return out, torch.cat([attention, before_end.long()], dim=1), width


def reward(
    tokenizer: AutoTokenizer, response: torch.Tensor, mask: torch.Tensor, problems: list[Problem]
) -> torch.Tensor:
    """Return 1 for each right response, 0 for a wrong one, (n,)."""
    texts = [
        tokenizer.decode(row[kept], skip_special_tokens=True) for row, kept in zip(response, mask.bool(), strict=True)
    ]
    right = [numeric(text, str(p.answer)).correct is True for text, p in zip(texts, problems, strict=True)]
    return torch.tensor(right, dtype=torch.float32)


def main() -> None:
    """Train, and print reward and KL."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--kl-coef", type=float, default=0.1, help="λ: the smaller, the farther the policy goes")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    args = parser.parse_args()
    torch.manual_seed(0)
    rng = random.Random(0)
    tokenizer = AutoTokenizer.from_pretrained(small_lm_path())
    policy = AutoModelForCausalLM.from_pretrained(small_lm_path()).eval()
    initial = AutoModelForCausalLM.from_pretrained(small_lm_path()).eval()
    value = Value()
    optimisers = [torch.optim.AdamW(m.parameters(), args.learning_rate, betas=(0.9, 0.95)) for m in (policy, value)]
    problems = generate_problems(400, rng, held_out=True)

    for iteration in range(args.iterations):
        # 1. Draw responses by the policy as it is, and see which are right.
        chosen = rng.sample(problems, ROLLOUTS)
        ids, attention, width = sample(policy, tokenizer, [problem.query for problem in chosen])
        mask = attention[:, width:]
        scores = reward(tokenizer, ids[:, width:], mask, chosen)

        # 2. Advantages: the reward comes with the last token; GAE spreads it over those before.
        with torch.no_grad():
            old_logprobs = token_logprobs(policy, ids, attention, width)
            ref_logprobs = token_logprobs(initial, ids, attention, width)
            old_values = value(ids, attention, width)
        rewards = at_last_token(scores, mask)
        advantages, returns = generalised_advantages(rewards, old_values, mask, gamma=GAMMA, gae_lambda=GAE_LAMBDA)
        advantages = standardised(advantages, mask)  # λ then counts standard deviations

        # 3. A few passes over them: APA's squared error for the policy, the squared error of returns for the values.
        for _ in range(EPOCHS):
            for rows in torch.randperm(ROLLOUTS).split(BATCH):
                kept, weights = mask[rows], token_weights(mask[rows])
                logprobs = token_logprobs(policy, ids[rows], attention[rows], width)
                of_policy, _ = apa_loss(logprobs, ref_logprobs[rows], advantages[rows], kept, kl_coef=args.kl_coef)
                of_value, _ = value_loss(value(ids[rows], attention[rows], width), returns[rows], kept)
                ((of_policy + of_value) * weights).sum().backward()
                for model, optimiser in zip((policy, value), optimisers, strict=True):
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                    optimiser.step()
                    optimiser.zero_grad()

        kl = (kl_k1(old_logprobs, ref_logprobs) * mask).sum(1).mean()
        foreseen = explained_variance(old_values, returns, mask)
        print(f"iteration {iteration}: right {scores.mean():.3f}, KL {kl:.3f}, explained variance {foreseen:+.2f}")


if __name__ == "__main__":
    main()
