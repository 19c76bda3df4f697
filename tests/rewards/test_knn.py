"""The nearest-neighbour null, by brute force."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from conftest import make_log, make_queries

from oirl.logs.cells import make_cells
from oirl.rewards.knn import NearestNeighbours


def test_equals_brute_force_over_the_k_most_similar() -> None:
    cells = make_cells(make_log(60))
    model = NearestNeighbours(k=7).fit(cells)
    queries = make_queries(10, seed=5)
    vectors = model._embedder.embed_block(model._embedder.prepare([*cells.queries, *queries]), "words").toarray()
    runs, successes = cells.matrices()
    overall = (successes.sum(axis=0) + 1) / (runs.sum(axis=0) + 2)
    predicted = model.predict(queries)
    for i, vector in enumerate(vectors[60:]):
        near = vectors[:60] @ vector
        if np.sort(near)[-7] == np.sort(near)[-8]:
            continue  # a tie at the border: any of the two may count
        top = np.argsort(-near)[:7]
        expected = (successes[top].sum(axis=0) + overall) / (runs[top].sum(axis=0) + 1)
        assert predicted[i] == pytest.approx(expected)


def test_with_all_queries_as_neighbours_it_is_the_mean() -> None:
    cells = make_cells(make_log(12))
    runs, successes = cells.matrices()
    overall = (successes.sum(axis=0) + 1) / (runs.sum(axis=0) + 2)
    expected = (successes.sum(axis=0) + overall) / (runs.sum(axis=0) + 1)
    predicted = NearestNeighbours(k=50).fit(cells).predict(["the cat", "", "水"])
    assert predicted == pytest.approx(np.tile(expected, (3, 1)))


def test_finds_the_kind_of_a_query(log: pa.Table) -> None:
    cells = make_cells(log)
    queries = make_queries(80, seed=31)
    predicted = NearestNeighbours().fit(cells).predict(queries)
    alpha = np.array(["alpha" in q for q in queries])
    a, b = cells.prompt_ids.index("a"), cells.prompt_ids.index("b")
    assert ((predicted[:, a] > predicted[:, b]) == alpha).mean() > 0.9


def test_a_prompt_no_neighbour_was_run_under_gets_its_mean() -> None:
    table = make_log(40)
    beta = pa.array(["beta" in q for q in table["query"].to_pylist()])
    is_a = pa.array([p == "a" for p in table["prompt_id"].to_pylist()])
    keep = [not (x and y) for x, y in zip(beta.to_pylist(), is_a.to_pylist(), strict=True)]
    cells = make_cells(table.filter(pa.array(keep)))  # `a` was run on alpha queries only
    model = NearestNeighbours(k=5).fit(cells)
    runs, successes = cells.matrices()
    p = cells.prompt_ids.index("a")
    assert runs[:, p].sum() < 80
    beta_query = next(q for q in make_queries(40) if "beta" in q)
    expected = (successes[:, p].sum() + 1) / (runs[:, p].sum() + 2)
    assert model.predict([beta_query])[0, p] == pytest.approx(expected)


def test_survives_its_saved_state() -> None:
    model = NearestNeighbours().fit(make_cells(make_log(60)))
    queries = make_queries(20, seed=8)
    restored = NearestNeighbours().restore(model.state())
    assert np.array_equal(restored.predict(queries), model.predict(queries))


def test_predicts_nothing_for_no_queries() -> None:
    model = NearestNeighbours().fit(make_cells(make_log(20)))
    assert model.predict([]).shape == (0, 3)
