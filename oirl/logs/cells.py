"""A log as counts: how often each prompt was run on each query, and how often it was right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from oirl.errors import ConfigError, DataError
from oirl.logs.text import normalise

LEAST_PROPENSITY = 1e-9
"""Below this a run would weigh as much as a billion others: a slip, not a design."""


@dataclass(frozen=True, slots=True)
class Cells:
    """The graded runs of a log, one cell per (query, prompt) that was run.

    Attributes:
        query_ids: Distinct queries, length Q.
        queries: Their texts.
        prompt_ids: Distinct prompts, length P.
        prompts: Their templates.
        query_index: Position of each cell's query, int64 (C,).
        prompt_index: Position of each cell's prompt, int64 (C,).
        runs: Graded runs of each cell, at least 1, int64 (C,).
        successes: Those that were right, int64 (C,).
        inverse_propensity: 1 / propensity, averaged over the runs of each cell, float64 (C,), NaN where it is not
            known of all of them; None where the log holds no propensities.
    """

    query_ids: list[str]
    queries: list[str]
    prompt_ids: list[str]
    prompts: list[str]
    query_index: np.ndarray
    prompt_index: np.ndarray
    runs: np.ndarray
    successes: np.ndarray
    inverse_propensity: np.ndarray | None = None

    @property
    def rate(self) -> np.ndarray:
        """Share of right runs of each cell, float64 (C,)."""
        return self.successes / self.runs

    def matrices(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (runs, successes) as matrices, int64 (Q, P); 0 runs where a prompt was not run."""
        shape = (len(self.queries), len(self.prompts))
        runs, successes = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        runs[self.query_index, self.prompt_index] = self.runs
        successes[self.query_index, self.prompt_index] = self.successes
        return runs, successes

    def of_queries(self, chosen: np.ndarray) -> Cells:
        """Return the cells of some queries.

        Args:
            chosen: Mask, bool (Q,): 1 = keep. All prompts stay, whether or not they were run on these queries.
        """
        kept = chosen[self.query_index]
        position = np.cumsum(chosen) - 1
        where = np.flatnonzero(chosen)
        return Cells(
            [self.query_ids[i] for i in where],
            [self.queries[i] for i in where],
            self.prompt_ids,
            self.prompts,
            position[self.query_index[kept]],
            self.prompt_index[kept],
            self.runs[kept],
            self.successes[kept],
            None if self.inverse_propensity is None else self.inverse_propensity[kept],
        )

    def of_prompts(self, prompt_ids: Sequence[str]) -> Cells:
        """Return the cells of some prompts, in the order given; queries without such a cell are left out.

        A prompt that the log does not hold gets no cell, and an empty text.
        """
        position = {name: i for i, name in enumerate(prompt_ids)}
        new = np.array([position.get(name, -1) for name in self.prompt_ids], dtype=np.int64)
        texts = dict(zip(self.prompt_ids, self.prompts, strict=True))
        kept = new[self.prompt_index] >= 0
        cells = Cells(
            self.query_ids,
            self.queries,
            list(prompt_ids),
            [texts.get(name, "") for name in prompt_ids],
            self.query_index[kept],
            new[self.prompt_index[kept]],
            self.runs[kept],
            self.successes[kept],
            None if self.inverse_propensity is None else self.inverse_propensity[kept],
        )
        present = np.zeros(len(self.queries), dtype=bool)
        present[cells.query_index] = True
        return cells.of_queries(present)


def name_actions(log: pa.Table, actions: str) -> pa.Table:
    """Return a log whose prompt ids name what is chosen: prompts, or pairs of language model and prompt.

    Args:
        log: Interactions; needs prompt_id and model.
        actions: "prompt" leaves the log as it is; "pair" names `MODEL | PROMPT_ID`, without rows that name no model.

    Raises:
        ConfigError: If `actions` is another word.
        DataError: If pairs are asked for and no row names its model.
    """
    if actions == "prompt":
        return log
    if actions != "pair":
        raise ConfigError(f"actions {actions!r}; allowed: prompt, pair")
    known = log.filter(pc.is_valid(log["model"]))
    if not len(known):
        raise DataError("actions 'pair' need the column `model`, and no row has one; give it with --set model=NAME")
    names = pc.binary_join_element_wise(known["model"], known["prompt_id"], " | ")
    return known.set_column(known.column_names.index("prompt_id"), "prompt_id", names)


def make_cells(log: pa.Table) -> Cells:
    """Count the graded runs of a log by query and prompt; rows whose `correct` is null do not count.

    Args:
        log: Interactions; needs query_id, query, prompt_id, prompt and correct. A column `propensity` is read too.

    Raises:
        DataError: If no row has a verdict, or one id stands for several texts.
    """
    graded = log.filter(pc.is_valid(log["correct"]))
    if not len(graded):
        raise DataError(
            f"none of the {len(log):,} rows has a verdict in `correct`; import them with --grade, such as "
            "--grade numeric, or map the column with --map correct=COLUMN"
        )
    query_ids, queries, query_index = _texts(graded, "query_id", "query")
    prompt_ids, prompts, prompt_index = _texts(graded, "prompt_id", "prompt")
    key = query_index * len(prompt_ids) + prompt_index
    cells, inverse, runs = np.unique(key, return_inverse=True, return_counts=True)
    right = graded["correct"].combine_chunks().to_numpy(zero_copy_only=False).astype(np.int64)
    successes = np.bincount(inverse, weights=right, minlength=len(cells)).astype(np.int64)
    return Cells(
        query_ids,
        queries,
        prompt_ids,
        prompts,
        cells // len(prompt_ids),
        cells % len(prompt_ids),
        runs.astype(np.int64),
        successes,
        _inverse_propensity(graded, inverse, runs),
    )


def _inverse_propensity(graded: pa.Table, cell: np.ndarray, runs: np.ndarray) -> np.ndarray | None:
    if "propensity" not in graded.column_names or graded["propensity"].null_count == len(graded):
        return None
    propensity = graded["propensity"].combine_chunks()
    known = np.flatnonzero(propensity.is_valid().to_numpy(zero_copy_only=False))
    values = propensity.to_numpy(zero_copy_only=False)
    bad = known[~((values[known] >= LEAST_PROPENSITY) & (values[known] <= 1))]
    if len(bad):
        raise DataError(
            f"propensity {values[bad[0]]:g} of query {graded['query_id'][int(bad[0])].as_py()!r} under prompt "
            f"{graded['prompt_id'][int(bad[0])].as_py()!r}: a probability from {LEAST_PROPENSITY:g} to 1 is needed"
        )
    inverse = 1 / values
    return np.asarray(np.bincount(cell, weights=inverse, minlength=len(runs)) / runs)


def _texts(log: pa.Table, id_column: str, text_column: str) -> tuple[list[str], list[str], np.ndarray]:
    """Return distinct ids, the text of each, and each row's position; refuse an id with several texts."""
    # Encoded before the chunks are combined: one array holds at most 2 GB of text.
    ids = log[id_column].cast(pa.string()).dictionary_encode().combine_chunks()
    texts = log[text_column].cast(pa.string()).dictionary_encode().combine_chunks()
    index = np.asarray(ids.indices, dtype=np.int64)
    text_index = np.asarray(texts.indices, dtype=np.int64)
    first = np.unique(index, return_index=True)[1]
    text_of = text_index[first]
    unlike = np.flatnonzero(text_of[index] != text_index)
    names, all_texts = ids.dictionary.to_pylist(), texts.dictionary.to_pylist()
    for i in unlike:
        name, first_text, text = names[index[i]], all_texts[text_of[index[i]]], all_texts[text_index[i]]
        # Another casing or spacing of a query is still that query; in a prompt it matters.
        if id_column == "query_id" and normalise(first_text) == normalise(text):
            continue
        raise DataError(
            f"{id_column} {name!r} stands for several texts in column {text_column!r}; give each text an id of its own"
        )
    return names, [all_texts[i] for i in text_of], index
