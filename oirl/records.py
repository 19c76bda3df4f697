"""The records of oirl and their Arrow schemas: one run of a prompt on a query, a preference pair, a query.

The columns are a contract between all parts of oirl and with users' files; bold ones in the documentation are
`required` here. Columns hold plain Arrow types, so that any Parquet reader can use a log without oirl.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import pyarrow as pa

SCHEMA_VERSION = 1
"""Raised when a column changes its meaning; files of a later version are refused."""


@dataclass(frozen=True, slots=True)
class Interaction:
    """One run of one prompt on one query: a row of a log.

    Attributes:
        query_id: Name of the query; by default a hash of its normalised text.
        query: The text that was asked.
        prompt_id: Name of the prompt; by default a hash of the prompt *template*.
        prompt: The prompt template (the action), not the rendered text.
        response: What the model replied.
        correct: True, False, or None where it is not known.
        score: A graded outcome, where there is one beside `correct`.
        answer: The gold answer.
        dataset: Name of the data set that the query comes from.
        split: "train", "test" or any name of a part; None where the log is not split.
        model: Name of the language model that replied.
        run_id: Name of the run that made the row.
        replicate: 0, 1, … for repeated runs of the same cell (query, prompt, model, run).
        propensity: Probability in (0, 1] with which the logger chose this prompt; None = unknown.
        sampling: Sampling settings, as JSON.
        tokens_in: Tokens of the rendered text.
        tokens_out: Tokens of the response.
        latency_s: Seconds from request to response.
        cost: Money, in the currency of the log.
        created_at: When the response was made, in UTC.
        metadata: Anything else, as JSON.
    """

    query_id: str
    query: str
    prompt_id: str
    prompt: str
    response: str | None = None
    correct: bool | None = None
    score: float | None = None
    answer: str | None = None
    dataset: str | None = None
    split: str | None = None
    model: str | None = None
    run_id: str | None = None
    replicate: int = 0
    propensity: float | None = None
    sampling: str | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None
    latency_s: float | None = None
    cost: float | None = None
    created_at: datetime | None = None
    metadata: str | None = None


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two responses to one query, of which the first is preferred.

    Attributes:
        pair_id: Name of the pair.
        query: The text that both responses answer.
        chosen: The preferred response.
        rejected: The other response.
        margin: By how much `chosen` is preferred, where it is known.
        source: Where the preference comes from.
        metadata: Anything else, as JSON.
    """

    pair_id: str
    query: str
    chosen: str
    rejected: str
    margin: float | None = None
    source: str | None = None
    metadata: str | None = None


@dataclass(frozen=True, slots=True)
class Query:
    """One query of a query list: something to ask, with its gold answer where it is known.

    Attributes:
        query_id: Name of the query; by default a hash of its normalised text.
        query: The text to ask.
        answer: The gold answer.
        dataset: Name of the data set that the query comes from.
        split: Name of the part of the data set.
        metadata: Anything else, as JSON.
    """

    query_id: str
    query: str
    answer: str | None = None
    dataset: str | None = None
    split: str | None = None
    metadata: str | None = None


def _schema(record: type, required: tuple[str, ...], types: dict[str, pa.DataType]) -> pa.Schema:
    names = record.__dataclass_fields__  # type: ignore[attr-defined]
    return pa.schema([pa.field(name, types.get(name, pa.string()), nullable=name not in required) for name in names])


INTERACTION_SCHEMA = _schema(
    Interaction,
    ("query_id", "query", "prompt_id", "prompt", "replicate"),
    {
        "correct": pa.bool_(),
        "score": pa.float64(),
        "replicate": pa.int32(),
        "propensity": pa.float64(),
        "tokens_in": pa.int32(),
        "tokens_out": pa.int32(),
        "latency_s": pa.float64(),
        "cost": pa.float64(),
        "created_at": pa.timestamp("us", tz="UTC"),
    },
)
PREFERENCE_SCHEMA = _schema(PreferencePair, ("pair_id", "query", "chosen", "rejected"), {"margin": pa.float64()})
QUERY_SCHEMA = _schema(Query, ("query_id", "query"), {})

SCHEMAS: dict[str, pa.Schema] = {
    "interactions": INTERACTION_SCHEMA,
    "preferences": PREFERENCE_SCHEMA,
    "queries": QUERY_SCHEMA,
}
"""Record name, as written into a file's metadata, -> schema."""
