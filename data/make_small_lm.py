"""Train the small language model of the demo from scratch on arithmetic word problems.

    python data/make_small_lm.py

writes `data/oirl_data/small_lm/` (model, tokenizer) and prints, as JSON, the share of right replies to
held-out problems for each prompt and kind of problem.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from oirl_data import small_lm_path
from oirl_data.problems import KINDS, MAX_NUMBER, Problem, Step, generate_problems, is_held_out, make_problem
from oirl_data.prompts import PROMPTS, TAUGHT, render, write_reply
from sample_replies import SAMPLING, is_right, sample_replies

if TYPE_CHECKING:
    from collections.abc import Iterator

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")
BATCH_SIZE = 64
BATCHES_PER_POOL = 16
SUMS_PER_ROW = 6
SUMS_SHARE = 0.1
PEAK_LEARNING_RATE = 3e-3
IGNORED = -100
Row = tuple[list[int], list[int]]
Batch = tuple[torch.Tensor, torch.Tensor]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the word-level tokenizer: one token per whole number, word and mark."""
    pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[.,?]"), "isolated")]
    )
    rng = random.Random(0)
    words: set[str] = set()
    for problem in generate_problems(20_000, rng):
        for text in [
            *(render(p, problem.query) for p in PROMPTS),
            *(write_reply(problem, p, rng) for p in TAUGHT),
        ]:
            words.update(word for word, _ in pre_tokenizer.pre_tokenize_str(text))
    numbers = [str(number) for number in range(MAX_NUMBER + 1)]
    vocabulary = [*SPECIAL_TOKENS, *numbers, *sorted(words - set(numbers))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizer
    # This decoder joins words by spaces and puts marks back onto the word before; no word has the prefix.
    tokenizer.decoder = decoders.WordPiece(prefix="@@", cleanup=True)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=128,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build the untrained model, about half a million parameters, with untied embeddings."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    # The usual deviation of 0.02 is made for wide models; here number tokens then take far longer to part.
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.3)
    return model


def _problem_row(rng: random.Random, tokenizer: PreTrainedTokenizerFast) -> Row:
    """Write a fresh problem under a drawn prompt and a taught reply; only reply tokens carry a label."""
    problem = make_problem(rng)
    while is_held_out(problem.query):
        problem = make_problem(rng)
    prompt_id = rng.choice(TAUGHT)
    rendered = tokenizer(render(prompt_id, problem.query))["input_ids"]
    reply = tokenizer(write_reply(problem, prompt_id, rng), add_special_tokens=False)["input_ids"]
    reply = [*reply, tokenizer.eos_token_id]
    return rendered + reply, [IGNORED] * len(rendered) + reply


def _sums_row(rng: random.Random, tokenizer: PreTrainedTokenizerFast) -> Row:
    """Write a row of bare calculations; only their results carry a label."""
    steps: list[Step] = []
    while len(steps) < SUMS_PER_ROW:
        steps += make_problem(rng).steps
    ids, labels = [tokenizer.bos_token_id], [IGNORED]
    for step in steps[:SUMS_PER_ROW]:
        words = [str(step.left), step.op, str(step.right), "=", str(step.result), "."]
        tokens = tokenizer.convert_tokens_to_ids(words)
        ids += tokens
        labels += [IGNORED] * 4 + [tokens[4], IGNORED]
    return ids, labels


def training_batches(rng: random.Random, tokenizer: PreTrainedTokenizerFast, steps: int) -> Iterator[Batch]:
    """Yield batches: bare calculations in the first fifth, then mostly problems with taught replies."""
    # A calculation is six tokens long and a problem about forty: the tables are learnt far faster alone.
    for _ in range(steps // 5):
        yield _pad([_sums_row(rng, tokenizer) for _ in range(BATCH_SIZE)], tokenizer.pad_token_id)
    while True:
        rows = [
            _sums_row(rng, tokenizer) if rng.random() < SUMS_SHARE else _problem_row(rng, tokenizer)
            for _ in range(BATCH_SIZE * BATCHES_PER_POOL)
        ]
        # Rows of like length go together: padding would otherwise be half of the work.
        rows.sort(key=lambda row: len(row[0]))
        starts = list(range(0, len(rows), BATCH_SIZE))
        rng.shuffle(starts)
        for start in starts:
            yield _pad(rows[start : start + BATCH_SIZE], tokenizer.pad_token_id)


def _pad(rows: list[Row], pad_id: int) -> Batch:
    """Pad on the right; this needs no attention mask, as the model is causal and padding has no label."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [pad_id] * (width - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in rows])
    return ids, labels


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int) -> None:
    """Train with AdamW, a short warm-up and a cosine decay of the learning rate to zero."""
    batches = training_batches(random.Random(seed), tokenizer, steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    warm_up = max(1, min(100, steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))),
    )
    model.train()
    start = time.perf_counter()
    for step in range(1, steps + 1):
        ids, labels = next(batches)
        logits = model(input_ids=ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0 or step == steps:
            seconds = time.perf_counter() - start
            print(f"step {step}/{steps} loss {loss.item():.3f} {seconds:.0f} s", file=sys.stderr, flush=True)
    model.eval()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Save model and tokenizer so that the Auto classes of `transformers` 4 and 5 load them."""
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=SAMPLING["temperature"],
        top_p=SAMPLING["top_p"],
        max_new_tokens=SAMPLING["max_new_tokens"],
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    # Some versions write the weights readable for their owner only.
    (out / "model.safetensors").chmod(0o644)
    # Version 5 writes a class name that version 4 does not know; both know this one.
    config_path = out / "tokenizer_config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def success_table(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: list[Problem]
) -> dict[str, dict[str, float]]:
    """Return the share of right replies for each prompt, by kind of problem and over all."""
    table: dict[str, dict[str, float]] = {}
    for prompt_id in PROMPTS:
        rendered = [render(prompt_id, problem.query) for problem in problems]
        keys = [f"check:{prompt_id}:{i}" for i in range(len(problems))]
        replies = sample_replies(model, tokenizer, rendered, keys)
        right = [is_right(r.text, p.answer) for r, p in zip(replies, problems, strict=True)]
        row = {}
        for kind in KINDS:
            of_kind = [ok for ok, p in zip(right, problems, strict=True) if p.kind == kind]
            row[kind] = round(sum(of_kind) / len(of_kind), 3)
        table[prompt_id] = {**row, "all": round(sum(right) / len(right), 3)}
    return table


def main() -> None:
    """Train, save and measure the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=small_lm_path())
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--check", type=int, default=800, help="held-out problems to measure on")
    args = parser.parse_args()
    # One thread: the order of additions, and with it the weights, would depend on the number of threads.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    train(model, tokenizer, args.steps, args.seed)
    save(model, tokenizer, args.out)
    problems = generate_problems(args.check, random.Random("check"), held_out=True)
    result = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": len(tokenizer),
        "steps": args.steps,
        "seed": args.seed,
        "success": success_table(model, tokenizer, problems),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
