"""Correctness models of responses: what they must learn, must not learn, and refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import make_log, make_queries
from scipy.special import logit

from oirl import ResponseRewardModel, load
from oirl.errors import ConfigError, DataError, ModelFileError, NotFittedError, UnknownNameError
from oirl.logs.pairs import NO_RESPONSE, NO_VERDICT
from oirl.rewards.embedders import TfidfEmbedder
from oirl.rewards.response_checks import CHECKS
from oirl.rewards.response_features import ResponseFeatures
from oirl.rewards.responses import DistinctResponses, graded_responses, response_metrics
from oirl.statistics import metrics

FAST: dict[str, dict[str, Any]] = {
    "linear": {"strength": 3.0},
    "xgboost": {"rounds": 30},
    "mlp": {"epochs": 20, "learning_rate": 1e-2},
}


def counting(texts: list[str]) -> np.ndarray:
    return np.array([[t.count("sure"), t.count("maybe"), len(t) / 100] for t in texts], dtype=float)


EMBEDDERS: dict[str, Any] = {"checks": "checks", "tfidf": "tfidf", "callable": counting}


def make_responses(
    n: int = 80, *, per_query: int = 4, seed: int = 0, p_true: float = 1.0, p_false: float = 0.0
) -> pa.Table:
    """Return a log whose responses add up two numbers, half of them truly and half of them falsely.

    A response with a true equation is right with probability `p_true`, one with a false equation with `p_false`.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for i, query in enumerate(make_queries(n, seed)):
        a, b = rng.integers(10, 90, 2)
        for k in range(per_query):
            off = 0 if k % 2 else int(rng.integers(1, 30))
            tone = "sure" if k % 2 else "maybe"
            text = f"Step {k + 1}, {tone}: {a} + {b} = {a + b + off}. The answer is {a + b + off}."
            row = {
                "query_id": f"q{i}",
                "query": f"{query} Add {a} and {b}.",
                "prompt_id": f"p{k % 2}",
                "prompt": "{query}",
            }
            rows.append({**row, "response": text, "correct": bool(rng.random() < (p_false if off else p_true))})
    return with_optional(pa.Table.from_pylist(rows))


def with_optional(table: pa.Table) -> pa.Table:
    for name in ("split", "model"):
        table = table.append_column(name, pa.nulls(len(table), pa.string()))
    return table


def column(table: pa.Table, name: str, values: Any) -> pa.Table:
    field = table.schema.field(name)
    return table.set_column(table.schema.get_field_index(name), name, pa.array(values, field.type))


def texts_of(table: pa.Table) -> tuple[list[str], list[str]]:
    return table["query"].to_pylist(), table["response"].to_pylist()


def within(model: ResponseRewardModel, table: pa.Table) -> float:
    """Return the AUC within queries on a log."""
    right = np.array(table["correct"].to_pylist(), dtype=int)
    query = np.unique(table["query_id"].to_pylist(), return_inverse=True)[1]
    return metrics.auc_within(model.predict_reward(*texts_of(table)), np.ones(len(right), int), right, query)


SMALL, NEW = make_responses(40), make_responses(30, seed=77)


@pytest.fixture(scope="module", params=[(m, e) for m in FAST for e in EMBEDDERS], ids="-".join)
def fitted(request: pytest.FixtureRequest) -> tuple[ResponseRewardModel, str]:
    model, kind = request.param
    return ResponseRewardModel(model, embedder=EMBEDDERS[kind], params=FAST[model]).fit(SMALL), kind


def test_every_model_tells_true_from_false_on_unseen_queries(fitted: tuple[ResponseRewardModel, str]) -> None:
    model, _ = fitted
    assert within(model, NEW) > 0.9
    assert (model.metrics_["auc_within_query"] or 0) > 0.9
    assert (model.metrics_["brier_skill"] or 0) > 0.2


def test_estimates_are_sound(fitted: tuple[ResponseRewardModel, str]) -> None:
    model, _ = fitted
    queries, responses = texts_of(NEW)
    queries, responses = [*queries, "", "水"], [*responses, "9,000 ½", ""]
    found = model.estimate(queries, responses)
    assert found.reward.shape == found.spread.shape == (len(queries),)
    assert np.isfinite([found.reward, found.spread]).all()
    assert (found.spread >= 0).all()
    assert found.probability == pytest.approx(1 / (1 + np.exp(-found.reward)))
    assert np.array_equal(model.predict_proba(queries, responses), found.probability)
    assert np.array_equal(model.predict_reward(queries, responses), found.reward)
    alone = model.estimate(queries[3:4], responses[3:4])
    assert alone.reward[0] == pytest.approx(found.reward[3], abs=1e-4)
    assert model.estimate([], []).reward.shape == (0,)


def test_a_saved_model_says_the_same(fitted: tuple[ResponseRewardModel, str], tmp_path: Path) -> None:
    model, kind = fitted
    model.save(tmp_path / "m")
    restored = load(tmp_path / "m", embedder=counting if kind == "callable" else None)
    assert type(restored) is ResponseRewardModel
    a, b = (m.estimate(*texts_of(NEW)) for m in (model, restored))
    assert b.reward == pytest.approx(a.reward, abs=1e-6)
    assert b.spread == pytest.approx(a.spread, abs=1e-6)
    assert (restored.metrics_, restored.warnings_) == (model.metrics_, model.warnings_)
    assert {key: restored.data_[key] for key in model.data_} == model.data_
    assert restored.seen_.overlap(SMALL["query"].unique().to_pylist()) == (40, 0)
    assert {f.suffix for f in (tmp_path / "m").iterdir()} <= {".json", ".npz", ".ubj"}
    restored.save(tmp_path / "again")
    again = load(tmp_path / "again", embedder=counting if kind == "callable" else None)
    assert np.array_equal(again.predict_reward(*texts_of(NEW)), restored.predict_reward(*texts_of(NEW)))


def test_a_second_fit_says_the_same(fitted: tuple[ResponseRewardModel, str]) -> None:
    model, _ = fitted
    other = model.clone()
    assert not hasattr(other, "metrics_")
    other.fit(make_responses(30, seed=5)).fit(SMALL)
    assert np.array_equal(other.predict_reward(*texts_of(NEW)), model.predict_reward(*texts_of(NEW)))
    assert other.metrics_ == model.metrics_


def test_what_suits_a_query_is_learned_from_both_texts() -> None:
    """ "Sure" is right for alpha queries and wrong for beta ones: neither text alone tells."""

    def leaning(texts: list[str]) -> np.ndarray:
        signs = [("alpha" in t or "sure" in t) - ("beta" in t or "maybe" in t) for t in texts]
        return np.array(signs, dtype=float)[:, None]

    def with_taste(log: pa.Table) -> pa.Table:
        return column(log, "correct", [("alpha" in q) == ("sure" in r) for q, r in zip(*texts_of(log), strict=True)])

    model = ResponseRewardModel(embedder=leaning, params={"strength": 1.0}).fit(with_taste(SMALL))
    assert within(model, with_taste(NEW)) == 1.0


def test_an_odd_response_does_not_run_away_with_the_checks() -> None:
    features = ResponseFeatures("checks")
    prepared = features.prepare(*texts_of(SMALL))
    rows = np.asarray(features.fit(prepared).embed(prepared))[:, : len(CHECKS)]
    assert rows.mean(axis=0) == pytest.approx(0, abs=0.1)
    odd = np.asarray(features.embed(features.prepare(["?"], ["1 + 1 = 3! " * 500])))[:, : len(CHECKS)]
    assert np.abs(odd).max() == 5


def test_words_of_queries_and_of_responses_are_learned_apart() -> None:
    features = ResponseFeatures(TfidfEmbedder())
    features.fit(features.prepare(*texts_of(SMALL)))
    arrays_ = features.arrays()
    assert not np.array_equal(arrays_["responses.words_hashes"], arrays_["queries.words_hashes"])
    alone = TfidfEmbedder()
    alone.fit(alone.prepare(SMALL["response"].to_pylist()))
    assert np.array_equal(arrays_["responses.words_hashes"], alone.arrays()["words_hashes"])


def test_verdicts_that_mean_nothing_teach_nothing() -> None:
    log = make_responses(150)
    skills, areas = [], []
    for seed in range(3):
        shuffled = np.random.default_rng(seed).permutation(log["correct"].to_pylist())
        found = ResponseRewardModel(params={"strength": 30.0}).fit(column(log, "correct", shuffled)).metrics_
        skills.append(found["brier_skill"])
        areas.append(found["auc_within_query"])
    assert max(skills) <= 0.005
    assert np.mean(areas) == pytest.approx(0.5, abs=0.06)


def test_probabilities_are_calibrated() -> None:
    """Four in five responses with a true equation are right, three in ten of the others."""
    log = make_responses(300, p_true=0.8, p_false=0.3)
    model = ResponseRewardModel().fit(log)
    new = make_responses(100, seed=7)
    true = np.array(new["correct"].to_pylist())
    predicted = model.predict_proba(*texts_of(new))
    assert predicted[true].mean() == pytest.approx(0.8, abs=0.06)
    assert predicted[~true].mean() == pytest.approx(0.3, abs=0.06)
    assert predicted[true].std() < 0.1
    assert (model.metrics_["ece"] or 1) < 0.06
    # The best that can be known: Brier 0.8·0.2 and 0.3·0.7, against 0.55·0.45.
    assert model.metrics_["brier_skill"] == pytest.approx(1 - 0.185 / 0.2475, abs=0.06)


def test_the_spread_falls_with_more_data_as_a_standard_error_does() -> None:
    """Ten times the queries: about a third of the spread."""
    few, many = (
        ResponseRewardModel(params={"strength": 3.0}).fit(make_responses(n, p_true=0.8, p_false=0.3)) for n in (40, 400)
    )
    ratio = many.estimate(*texts_of(NEW)).spread.mean() / few.estimate(*texts_of(NEW)).spread.mean()
    assert 0.1 < ratio < 0.6


@pytest.mark.parametrize("embedder", ["checks", "tfidf"])
def test_the_order_of_the_rows_does_not_matter(embedder: str) -> None:
    shuffled = SMALL.take(pa.array(np.random.default_rng(0).permutation(len(SMALL))))
    a, b = (ResponseRewardModel(embedder=embedder, params={"strength": 3.0}).fit(t) for t in (SMALL, shuffled))
    assert b.predict_reward(*texts_of(NEW)) == pytest.approx(a.predict_reward(*texts_of(NEW)), abs=2e-3)
    assert b.metrics_ == pytest.approx(a.metrics_, abs=1e-3)
    assert {**b.data_, "fingerprint": ""} == {**a.data_, "fingerprint": ""}


def test_chunks_of_a_table_do_not_matter() -> None:
    chunked = pa.concat_tables([SMALL.slice(0, 37), SMALL.slice(37, 50), SMALL.slice(87)])
    a, b = (ResponseRewardModel(params={"strength": 3.0}).fit(t) for t in (SMALL, chunked))
    assert np.array_equal(a.predict_reward(*texts_of(NEW)), b.predict_reward(*texts_of(NEW)))


def test_equal_responses_are_one_with_several_runs() -> None:
    log = pa.table(
        {
            "query_id": ["b", "a", "b", "b", "a", "a"],
            "query": ["B?", "A?", "B?", "B?", "A?", "A?"],
            "response": ["x", "x", "y", "x", "x", "z"],
            "correct": [True, False, True, False, True, True],
        }
    )
    rows = DistinctResponses(log)
    found = {
        (rows.query_ids[q], rows.queries[q], text): (runs, right)
        for q, text, runs, right in zip(rows.query, rows.responses, rows.runs, rows.successes, strict=True)
    }
    expected = {("b", "B?", "x"): (2, 1), ("b", "B?", "y"): (1, 1), ("a", "A?", "x"): (2, 1), ("a", "A?", "z"): (1, 1)}
    assert found == expected
    assert [rows.responses[i] for i in rows.row] == log["response"].to_pylist()
    assert [rows.query_ids[rows.query[i]] for i in rows.row] == log["query_id"].to_pylist()


def test_a_log_twice_over_has_the_same_metrics_and_twice_the_runs() -> None:
    noisy = make_responses(40, p_true=0.8, p_false=0.3)
    model = ResponseRewardModel(params={"strength": 3.0}).fit(pa.concat_tables([noisy, noisy]))
    assert model.data_["n_rows"] == 320
    assert (model.data_["n_responses"], model.data_["n_queries"]) == (160, 40)
    # Twice the runs under twice the penalty is the same problem.
    single = ResponseRewardModel(params={"strength": 1.5}).fit(noisy)
    assert model.metrics_ == pytest.approx(single.metrics_, abs=0.02)
    assert model.data_["success"] == pytest.approx(single.data_["success"])


def test_what_is_remembered_of_the_log() -> None:
    model = ResponseRewardModel().fit(SMALL)
    assert model.data_["n_rows"] == model.data_["n_responses"] == 160
    assert model.data_["success"] == 0.5
    assert model.data_["best_prompt"] == "p1"
    assert model.left_out_ == {}
    assert model.seen_.overlap(SMALL["query"].to_pylist()) == (160, 0)


def test_rows_without_response_or_verdict_are_left_out_and_counted() -> None:
    rows = SMALL.to_pylist()
    for i in (0, 1, 2):
        rows[i]["correct"] = None
    rows[2]["response"] = None
    for i, text in ((3, None), (5, ""), (6, " \n\t")):
        rows[i]["response"] = text
    model = ResponseRewardModel(params={"strength": 3.0}).fit(pa.Table.from_pylist(rows, SMALL.schema))
    assert model.left_out_ == {NO_VERDICT: 3, NO_RESPONSE: 3}
    assert model.data_["n_rows"] == 154
    kept, left_out = graded_responses(pa.Table.from_pylist(rows, SMALL.schema))
    assert kept["response"].to_pylist() == [r["response"] for i, r in enumerate(rows) if i not in (0, 1, 2, 3, 5, 6)]
    assert left_out == model.left_out_


def test_metrics_by_hand() -> None:
    """Two queries: 0.9 was right, 0.6 wrong; 0.2 was right once in two, 0.4 wrong."""
    found = response_metrics(
        np.array([0.9, 0.6, 0.2, 0.4]), np.array([1, 1, 2, 1]), np.array([1, 0, 1, 0]), np.array([0, 0, 1, 1]), 0.4
    )
    brier = (0.01 + 0.36 + 0.64 + 0.04 + 0.16) / 5
    assert found["brier"] == pytest.approx(brier)
    assert found["brier_skill"] == pytest.approx(1 - brier / 0.24)
    assert found["log_loss"] == pytest.approx(-np.log([0.9, 0.4, 0.2, 0.8, 0.6]).mean())
    assert found["auc"] == pytest.approx((3 + 0.5) / 6)
    assert found["auc_within_query"] == pytest.approx((1 + 0.5) / 3)


def test_metrics_that_are_not_defined_are_none() -> None:
    found = response_metrics(np.array([0.5]), np.array([1]), np.array([1]), np.array([0]), 0.5)
    assert found["auc"] is None
    assert found["auc_within_query"] is None
    json.dumps(found, allow_nan=False)


def test_rewards_are_the_calibrated_mean_over_members() -> None:
    model = ResponseRewardModel(folds=3, params={"strength": 3.0}).fit(SMALL)
    slope, intercept = model._platt
    scores = model._committee.scores(model._features.embed(model._features.prepare(*texts_of(NEW))))
    assert scores.shape == (3, len(NEW))
    found = model.estimate(*texts_of(NEW))
    assert found.reward == pytest.approx(slope * scores.mean(axis=0) + intercept)
    assert logit(found.probability) == pytest.approx(found.reward, abs=1e-6)
    assert found.spread == pytest.approx(slope * scores.std(axis=0) * np.sqrt(2))


def saved(tmp_path: Path, **options: Any) -> Path:
    ResponseRewardModel(**options).fit(SMALL).save(tmp_path / "m")
    return tmp_path / "m"


def sign(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda manifest: None) -> None:
    """Change the manifest, and give it the right checksums, as whoever means harm would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    files = [p for p in folder.iterdir() if p.name != "manifest.json"]
    manifest["files"] = {p.name: sha256(p.read_bytes()).hexdigest() for p in files}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def arrays(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        with np.load(folder / "weights.npz") as file:
            found = dict(file)
        change(found)
        np.savez_compressed(folder / "weights.npz", **found)
        sign(folder)

    return edit


def manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda folder: sign(folder, change)


def flipped_byte(folder: Path) -> None:
    content = bytearray((folder / "weights.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "weights.npz").write_bytes(content)


BROKEN: dict[str, Callable[[Path], Any]] = {
    "flipped byte": flipped_byte,
    "cut manifest": lambda f: (f / "manifest.json").write_text((f / "manifest.json").read_text()[:-50]),
    "a file too many": lambda f: (f / "more.npz").write_bytes(b""),
    "no weights": lambda f: (f / "weights.npz").unlink(),
    "unknown model": manifest(lambda m: m["model"].update(name="nope")),
    "a model that is code": manifest(lambda m: m["model"].update(name="os:system")),
    "unknown parameter": manifest(lambda m: m["model"]["members"][0].update(nope=1)),
    "bad parameter": manifest(lambda m: m["model"]["members"][0].update(strength=-1)),
    "no members": manifest(lambda m: m["model"].update(members=[])),
    "a member too many": manifest(lambda m: m["model"]["members"].append({"strength": 1.0})),
    "another learner": manifest(lambda m: m["model"].update(name="mlp", members=[{}])),
    "slope is text": manifest(lambda m: m["calibration"].update(slope="1")),
    "no slope": manifest(lambda m: m.update(calibration={})),
    "no data": manifest(lambda m: m.update(data={})),
    "another embedder": manifest(lambda m: m.update(embedder={"name": "tfidf", "min_df": 2, "blocks": ["words"]})),
    "an embedder that is code": manifest(lambda m: m.update(embedder={"name": "os:getcwd"})),
    "no embedder": manifest(lambda m: m.update(embedder={})),
    "weights missing": arrays(lambda a: a.pop("member0.weights")),
    "weights cut": arrays(lambda a: a.update({"member0.weights": a["member0.weights"][:-1]})),
    "weights are NaN": arrays(lambda a: a.update({"member0.weights": a["member0.weights"] * np.nan})),
    "weights are text": arrays(lambda a: a.update({"member0.weights": np.array(["x"] * 9)})),
    "no intercept": arrays(lambda a: a.update({"member1.intercept": np.zeros(0)})),
    "checks of another version": arrays(lambda a: a.update({"features.checks_mean": np.zeros(1)})),
    "scales cut": arrays(lambda a: a.update({"features.checks_scale": np.ones(3)})),
    "scale missing": arrays(lambda a: a.pop("features.checks_scale")),
    "seen queries missing": arrays(lambda a: a.pop("seen.texts")),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("sound"), params={"strength": 3.0})


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_folder_is_refused_in_one_line(sound: Path, tmp_path: Path, how: str) -> None:
    folder = Path(shutil.copytree(sound, tmp_path / "m"))
    BROKEN[how](folder)
    with pytest.raises(ModelFileError) as found:
        load(folder)
    assert "\n" not in str(found.value)


def test_signed_but_unchanged_folders_still_load(sound: Path, tmp_path: Path) -> None:
    """Without this the tests above could pass for another reason."""
    folder = Path(shutil.copytree(sound, tmp_path / "m"))
    arrays(lambda a: None)(folder)
    assert np.isfinite(load(folder).predict_reward(["a"], ["b"])).all()


def test_broken_trees_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, model="xgboost", params={"rounds": 3})
    tree = next(folder.glob("*.ubj"))
    tree.write_bytes(tree.read_bytes()[: tree.stat().st_size // 2])
    with pytest.raises(ModelFileError, match="SHA-256"):
        load(folder)
    sign(folder)
    with pytest.raises(ModelFileError):
        load(folder)


def test_an_embedder_of_ones_own_is_asked_for_and_checked(tmp_path: Path) -> None:
    folder = saved(tmp_path, embedder=counting, params={"strength": 3.0})
    with pytest.raises((ModelFileError, ConfigError)):
        load(folder)
    with pytest.raises((ModelFileError, ConfigError)):
        load(folder, embedder=lambda texts: np.ones((len(texts), 3)))
    assert load(folder, embedder=counting).predict_reward(["a"], ["b"]).shape == (1,)


def test_a_folder_holds_no_text_of_the_log(sound: Path) -> None:
    content = (sound / "manifest.json").read_text()
    assert not any(text in content for text in [*SMALL["query"].to_pylist(), *SMALL["response"].to_pylist()])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.slice(0, 0), "no row with a response and a verdict .*it has no rows.* --map response"),
        (lambda t: column(t, "correct", [None] * len(t)), "160 rows: no verdict.*--grade"),
        (lambda t: column(t, "response", [None] * len(t)), "160 rows: no response.*--map response=FIELD"),
        (lambda t: t.drop_columns(["response"]), "no row with a response and a verdict .*160 rows: no response"),
        (lambda t: column(t, "correct", [True] * len(t)), "all responses of the log are right"),
        (lambda t: column(t, "correct", [False] * len(t)), "all are wrong"),
        (lambda t: t.slice(0, 4), "one query.* at least two unlike queries"),
        (lambda t: t.drop_columns(["query_id"]), "no column 'query_id'"),
    ],
    ids=["empty", "no verdicts", "no responses", "no column", "all right", "all wrong", "one query", "no query_id"],
)
def test_logs_that_teach_nothing_are_refused(change: Callable[[pa.Table], pa.Table], message: str) -> None:
    with pytest.raises(DataError, match=message):
        ResponseRewardModel().fit(change(SMALL))


def test_a_log_of_prompts_alone_is_refused() -> None:
    with pytest.raises(DataError, match="no row with a response and a verdict"):
        ResponseRewardModel().fit(make_log(12))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"folds": 1}, ConfigError, "folds=1.*at least 2"),
        ({"folds": 2.5}, ConfigError, "folds=2.5"),
        ({"seed": -1}, ConfigError, "seed=-1"),
        ({"model": "linaer"}, UnknownNameError, "did you mean 'linear'.*xgboost"),
        ({"model": "classifier"}, UnknownNameError, "unknown response-model 'classifier'"),
        ({"params": {"strenght": 1}}, ConfigError, "'linear'.*strenght"),
        ({"params": {"strength": 0}}, ConfigError, "strength=0.*above 0"),
        ({"model": "xgboost", "params": {"rounds": 0.5}}, ConfigError, "rounds=0.5.*whole number"),
        ({"model": "mlp", "params": {"hidden": [8, "x"]}}, ConfigError, "hidden='x'"),
        ({"embedder": "tfdif"}, UnknownNameError, "tfidf"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        ResponseRewardModel(**options).fit(SMALL)


def test_what_is_not_fitted_says_so(tmp_path: Path) -> None:
    model = ResponseRewardModel()
    with pytest.raises(NotFittedError, match="call fit"):
        model.predict_proba(["a"], ["b"])
    with pytest.raises(NotFittedError):
        model.save(tmp_path / "m")
    assert not (tmp_path / "m").exists()
    assert vars(model) == {"model": "linear", "embedder": "checks", "folds": 5, "seed": 0, "params": None}
    assert model.fit(SMALL) is model
    with pytest.raises(ConfigError, match="2 queries and 1 responses"):
        model.predict_proba(["a", "b"], ["c"])


def test_more_folds_than_queries_are_cut_down() -> None:
    model = ResponseRewardModel(folds=50, params={"strength": 3.0}).fit(make_responses(6))
    assert 2 <= len(model._committee.members) <= 6
    two = make_responses(2)
    assert np.isfinite(ResponseRewardModel(params={"strength": 3.0}).fit(two).predict_reward(*texts_of(two))).all()


def test_near_duplicates_of_a_query_share_a_fold() -> None:
    """Each query has a twin that differs from it in a number."""
    log = make_responses(40)
    rows = log.to_pylist()
    twins = [{**r, "query_id": r["query_id"] + "b", "query": r["query"].replace("Add ", "Add 1")} for r in rows]
    model = ResponseRewardModel(folds=4, params={"strength": 3.0})
    folds = {}
    learn = model._learn

    def spy(queries: list[str], *rest: Any) -> tuple[np.ndarray, np.ndarray]:
        scores, fold = learn(queries, *rest)
        folds.update(zip(queries, fold.tolist(), strict=True))
        return scores, fold

    model._learn = spy  # type: ignore[method-assign]
    model.fit(pa.Table.from_pylist(rows + twins, log.schema))
    assert set(folds.values()) == {0, 1, 2, 3}
    for row, twin in zip(rows, twins, strict=True):
        assert folds[row["query"]] == folds[twin["query"]]
