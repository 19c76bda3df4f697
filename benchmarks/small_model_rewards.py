"""Reward models on the demo's small language model, with pairs of its own replies. Prints JSON.

Pairs are right over wrong replies of the demo log, four a query; trained on those of its train split, judged on those
of its test split, accuracy with 95% intervals clustered by group. Compared: the language model with scalar heads
trained by ranking alone, by ranking and imitation, and by LoRA (three seeds each, with the paired difference of the
first two); its frozen hidden states, n-grams, and checks as features of a linear Bradley-Terry model; and TRL's
RewardTrainer on the same model, pairs, passes, batch and learning rate, in pairs a second of training.

Run: python benchmarks/small_model_rewards.py [--seeds 3] [--epochs 2]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import common  # noqa: F401  (puts oirl on the path)
import numpy as np
import pyarrow as pa

import oirl
from oirl.logs.pairs import PAIRED, group_pairs, test_pairs, train_pairs
from oirl.rewards.preferences import PairedResponses, right_share
from oirl.statistics.intervals import normal_interval, success_interval
from oirl_data import demo_path, small_lm_path

BATCH, RATE = 16, 1e-3


def demo_pairs() -> tuple[pa.Table, pa.Table]:
    """Return train and test pairs of the demo log."""
    with tempfile.TemporaryDirectory() as folder:
        oirl.import_log(demo_path() / "replies.jsonl.gz", Path(folder) / "log.parquet", grade="numeric")
        pairs, _ = oirl.make_pairs(oirl.read_log(Path(folder) / "log.parquet", PAIRED), per_query=4)
    return train_pairs(pairs), test_pairs(pairs)


def accuracy(model: Any, test: pa.Table) -> np.ndarray:
    """Return which test pairs a model has right, ties ½."""
    rows = PairedResponses(test)
    reward = model.predict_reward(rows.queries, rows.responses)
    return right_share(reward[rows.chosen] - reward[rows.rejected])


def shown(right: np.ndarray, groups: np.ndarray, seconds: float, pairs: int) -> dict[str, Any]:
    """Return accuracy with its interval, and speed."""
    value, low, high = success_interval(right, groups)
    return {
        "pair_accuracy": round(value, 4),
        "interval": [round(low, 4), round(high, 4)],
        "seconds": round(seconds, 1),
        "pairs a second": round(pairs / seconds),
    }


def with_trl(train: pa.Table, epochs: int) -> float:
    """Train TRL's reward model on the same pairs and return the seconds that training took."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    os.environ["HF_HUB_OFFLINE"] = "1"
    tokenizer = AutoTokenizer.from_pretrained(small_lm_path())
    model = AutoModelForSequenceClassification.from_pretrained(small_lm_path(), num_labels=1)
    eos = tokenizer.eos_token
    rows = train.select(["query", "chosen", "rejected"]).to_pylist()
    data = Dataset.from_list(
        [
            {"chosen": f"{r['query']}\n\n{r['chosen']}{eos}", "rejected": f"{r['query']}\n\n{r['rejected']}{eos}"}
            for r in rows
        ]
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = RewardConfig(
            output_dir=folder,
            per_device_train_batch_size=BATCH,
            num_train_epochs=epochs,
            learning_rate=RATE,
            report_to="none",
            save_strategy="no",
            logging_steps=50,
            disable_tqdm=True,
            use_cpu=True,
            gradient_checkpointing=False,
            bf16=False,
            max_length=128,
        )
        trainer = RewardTrainer(model=model, args=settings, train_dataset=data, processing_class=tokenizer)
        start = time.perf_counter()
        trainer.train()
        return time.perf_counter() - start


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    arguments = parser.parse_args()
    train, test = demo_pairs()
    groups = group_pairs(test).labels
    base = str(small_lm_path())
    ways = {
        "ranking": {},
        "ranking + 0.02 imitation": {"imitation": 0.02},
        "ranking, LoRA of rank 8": {"lora_rank": 8, "learning_rate": 3 * RATE},
    }
    found: dict[str, Any] = {}
    rights: dict[str, list[np.ndarray]] = {name: [] for name in ways}
    for name, way in ways.items():
        start = time.perf_counter()
        for seed in range(arguments.seeds):
            settings = {"learning_rate": RATE, "epochs": arguments.epochs, "batch": BATCH} | way
            model = oirl.LanguageModelRewardModel(base, seed=seed, **settings).fit(train)
            rights[name].append(accuracy(model, test))
        seconds = (time.perf_counter() - start) / arguments.seeds
        found[name] = shown(np.mean(rights[name], axis=0), groups, seconds, len(train) * arguments.epochs)
        found[name]["each seed"] = [round(float(r.mean()), 4) for r in rights[name]]
    features = ("checks", "tfidf", f"hidden-states:{base}", f"hidden-states:{base},pooling=mean")
    for embedder in features:
        start = time.perf_counter()
        right = accuracy(oirl.BradleyTerryRewardModel(embedder=embedder).fit(train), test)
        name = embedder.replace(base, "small model")
        found[f"linear on {name}"] = shown(right, groups, time.perf_counter() - start, len(train))
        rights[name] = [right]
    ranking, imitation = (np.mean(rights[name], axis=0) for name in list(ways)[:2])
    hidden, tfidf = rights["hidden-states:small model,pooling=mean"][0], rights["tfidf"][0]
    differences = {
        "imitation over ranking alone": imitation - ranking,
        "hidden states (mean) over tfidf": hidden - tfidf,
    }
    trl = with_trl(train, arguments.epochs)
    rate = len(train) * arguments.epochs / trl
    print(
        json.dumps(
            {
                "train pairs": len(train),
                "test pairs": len(test),
                "models": found,
                "differences": {
                    name: {"mean": round(float(d.mean()), 4), "interval": [round(float(e), 4) for e in ends]}
                    for name, d in differences.items()
                    for ends in [normal_interval(d, groups)]
                },
                "TRL RewardTrainer": {"seconds": round(trl, 1), "pairs a second": round(rate)},
                "training speed, oirl / TRL": round(found["ranking"]["pairs a second"] / rate, 2),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
