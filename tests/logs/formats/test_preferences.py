"""Preference data: HH-RLHF, TRL in all its shapes, UltraFeedback, RewardBench."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from reading import Row, column, read, refused, write_lines

from oirl.errors import ConfigError

PAIR = ("query", "chosen", "rejected")


def said(role: str, text: str) -> Row:
    return {"role": role, "content": text}


def hh(*turns: str) -> str:
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {turn}" for i, turn in enumerate(turns))


HH = [
    {"chosen": hh("Nine?", "Yes."), "rejected": hh("Nine?", "No.\n\nWhy?")},
    {"chosen": hh("Hi", "Two.", "And one?", "Three."), "rejected": hh("Hi", "Two.", "And one?", "Four.")},
    # They part before the last turn: the rest of both is the reply.
    {"chosen": hh("Go", "One", "more", "Two"), "rejected": hh("Go", "Uno", "más", "Dos")},
    {"chosen": hh("A", "x"), "rejected": hh("B", "y")},
    {"chosen": hh("A", "x"), "rejected": hh("A", "")},
    {"chosen": hh("A", "x"), "rejected": hh("A", "x ")},
    {"chosen": 3, "rejected": hh("A", "x")},
]
HH_PAIRS = [
    ("Nine?", "Yes.", "No.\n\nWhy?"),
    ("Human: Hi\n\nAssistant: Two.\n\nHuman: And one?", "Three.", "Four."),
    ("Go", "One\n\nHuman: more\n\nAssistant: Two", "Uno\n\nHuman: más\n\nAssistant: Dos"),
]


@pytest.mark.parametrize("name", ["hh.jsonl", "hh.jsonl.gz"])
def test_transcripts_part_where_the_replies_begin(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    data = "".join(json.dumps(row) + "\n" for row in HH).encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    report, rows = read(path, tmp_path)
    assert column(rows, *PAIR) == HH_PAIRS
    assert {(row["source"], row["margin"]) for row in rows} == {("hh-rlhf", None)}
    assert refused(tmp_path) == [
        (4, "the transcripts share no context that ends with a turn of the human"),
        (5, "the last turn of `rejected` is empty, or not the assistant's"),
        (6, "chosen and rejected are the same text: they show no preference"),
        (7, "`chosen` and `rejected` must be transcripts"),
    ]
    assert (report.record, [f["format"] for f in report.files]) == ("preferences", ["hh-rlhf"])


def test_a_longer_rest_ends_with_a_reply_of_the_assistant(tmp_path: Path) -> None:
    good = hh("Go", "One", "more", "Two")
    rests = [hh("Go", "Uno", "más", ""), hh("Go", "Uno", "más"), hh("Go", "Uno"), hh("Go", "Uno", "más", " ")]
    path = write_lines(tmp_path / "hh.jsonl", [{"chosen": good, "rejected": rest} for rest in rests])
    _, rows = read(path, tmp_path)
    assert column(rows, *PAIR) == [("Go", "One\n\nHuman: more\n\nAssistant: Two", "Uno")]
    reason = "the last turn of `rejected` is empty, or not the assistant's"
    assert refused(tmp_path) == [(1, reason), (2, reason), (4, reason)]


@pytest.mark.real_data
def test_real_transcripts(tmp_path: Path, real_data: Path) -> None:
    path = real_data / "hh_rlhf" / "harmless_base_test_part1.jsonl"
    report, rows = read(path, tmp_path)
    assert (report.rows_read, report.rows_kept, report.rows_refused) == (1500, 1496, 4)
    source = [json.loads(line) for line in path.read_text().splitlines()]
    lost = {row for row, _ in refused(tmp_path)}
    kept = [row for i, row in enumerate(source, 1) if i not in lost]
    for row, raw in zip(rows, kept, strict=True):
        assert raw["chosen"].rstrip().endswith(row["chosen"].rstrip())
        assert raw["rejected"].rstrip().endswith(row["rejected"].rstrip())
        assert row["query"] in raw["chosen"]
        assert row["query"] in raw["rejected"]


SYSTEM, ASK, BLUE, GREEN = (
    said("system", "Be brief."),
    said("user", "Sky?"),
    said("assistant", "Blue."),
    said("assistant", "Green."),
)
LONG = "System: Be brief.\n\nUser: Sky?"
TRL: dict[str, tuple[Row, tuple[str, str, str]]] = {
    "text, explicit": (
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
        ("The sky is", " blue.", " green."),
    ),
    "text, implicit": (
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        ("The sky is", "blue.", "green."),
    ),
    "chat, explicit": ({"prompt": [ASK], "chosen": [BLUE], "rejected": [GREEN]}, ("Sky?", "Blue.", "Green.")),
    "chat, implicit": ({"chosen": [ASK, BLUE], "rejected": [ASK, GREEN]}, ("Sky?", "Blue.", "Green.")),
    "chat with a system message, explicit": (
        {"prompt": [SYSTEM, ASK], "chosen": [BLUE], "rejected": [GREEN]},
        (LONG, "Blue.", "Green."),
    ),
    "chat with a system message, implicit": (
        {"chosen": [SYSTEM, ASK, BLUE], "rejected": [SYSTEM, ASK, GREEN]},
        (LONG, "Blue.", "Green."),
    ),
    "chat, prompt repeated": (
        {"prompt": [ASK], "chosen": [ASK, BLUE], "rejected": [ASK, GREEN]},
        ("Sky?", "Blue.", "Green."),
    ),
    "chat with a system message, the replies behind a turn of their own": (
        {"prompt": [SYSTEM], "chosen": [ASK, BLUE], "rejected": [ASK, GREEN]},
        (LONG, "Blue.", "Green."),
    ),
    "text prompt, chat replies": (
        {"prompt": "Sky?", "chosen": [ASK, BLUE], "rejected": [ASK, GREEN]},
        ("Sky?", "Blue.", "Green."),
    ),
}


@pytest.mark.parametrize("name", list(TRL))
def test_every_shape_of_trl(tmp_path: Path, name: str) -> None:
    row, pair = TRL[name]
    report, rows = read(write_lines(tmp_path / "trl.jsonl", [row]), tmp_path)
    assert column(rows, *PAIR) == [pair]
    assert [f["format"] for f in report.files] == ["trl"]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Sky?"}]
    assert rows[0]["metadata"].get("messages") == (messages if "system" in name else None)


def test_the_end_of_a_prompt_may_be_repeated_in_the_conversations(tmp_path: Path) -> None:
    row = {"prompt": [SYSTEM, ASK], "chosen": [ASK, BLUE], "rejected": [ASK, GREEN]}
    _, rows = read(write_lines(tmp_path / "trl.jsonl", [row]), tmp_path)
    assert column(rows, *PAIR) == [(LONG, "Blue.", "Green.")]


def test_margins(tmp_path: Path) -> None:
    same = {"chosen": "2", "rejected": "3"}
    pairs = [
        {"prompt": "a", "margin": 1.5, **same},
        {"prompt": "b", "score_chosen": 8.0, "score_rejected": 3.5, **same},
        {"prompt": "c", "score_chosen": 8.0, **same},
        {"prompt": "d", "margin": float("nan"), **same},
    ]
    _, rows = read(write_lines(tmp_path / "m.jsonl", pairs), tmp_path)
    assert column(rows, "query", "margin") == [("a", 1.5), ("b", 4.5), ("c", None), ("d", None)]


@pytest.mark.parametrize("odd", [float("inf"), "much"])
def test_a_margin_that_is_no_number_is_refused(tmp_path: Path, odd: object) -> None:
    pairs = [{"prompt": p, "margin": m, "chosen": "2", "rejected": "3"} for p, m in (("a", 1.0), ("b", odd))]
    report, rows = read(write_lines(tmp_path / "m.jsonl", pairs), tmp_path)
    assert column(rows, "query", "margin") == [("a", 1.0)]
    assert "a finite number" in report.reasons[0]["reason"]


def test_trl_rows_that_show_nothing_are_refused(tmp_path: Path) -> None:
    pairs = [
        {"prompt": "a", "chosen": "2", "rejected": "3"},
        {"chosen": "a", "rejected": "b"},
        {"prompt": "a", "chosen": "2", "rejected": [BLUE]},
        {"prompt": "a", "chosen": "2", "rejected": "2"},
        {"prompt": " ", "chosen": "2", "rejected": "3"},
        7,
    ]
    report, rows = read(write_lines(tmp_path / "m.jsonl", pairs), tmp_path)
    assert column(rows, *PAIR) == [("a", "2", "3")]
    assert [row for row, _ in refused(tmp_path)] == [2, 3, 4, 5, 6]
    assert refused(tmp_path)[0][1] == "no `prompt`, and `chosen` and `rejected` do not begin alike"
    assert report.rows_refused == 5


def test_unpaired_preferences_are_a_log(tmp_path: Path) -> None:
    rows_in = [
        {"prompt": "The sky is", "completion": " blue.", "label": True},
        {"prompt": "The sky is", "completion": " green.", "label": False},
        {"prompt": [SYSTEM, ASK], "completion": [BLUE], "label": True},
    ]
    report, rows = read(write_lines(tmp_path / "u.jsonl", rows_in), tmp_path)
    assert column(rows, "query", "prompt", "response", "correct", "replicate") == [
        ("The sky is", "", " blue.", True, 0),
        ("The sky is", "", " green.", False, 1),
        # What the system message says is the prompt.
        ("Sky?", "Be brief.", "Blue.", True, 0),
    ]
    assert (report.record, [f["format"] for f in report.files]) == ("interactions", ["trl-unpaired"])


def rated(model: str, response: str, fine: float, overall: float, **ratings: str) -> Row:
    notes = {name: {"Rating": rating, "Rationale": "x"} for name, rating in ratings.items()}
    scores = {"fine-grained_score": fine, "overall_score": overall}
    return {"model": model, "response": response, "annotations": notes, **scores}


FEEDBACK: list[Any] = [
    {
        "source": "flan",
        "instruction": "Count.",
        "completions": [
            rated("a", "2", 5.0, 1.0, helpfulness="5", honesty="N/A"),
            rated("b", "two", 4.0, 9.0, helpfulness="5", honesty="3"),
            rated("c", "3", 2.5, 2.0, helpfulness="1", honesty="4"),
            rated("d", "zwei", 4.0, 4.0, helpfulness="4", honesty="4"),
        ],
    },
    {"source": "flan", "instruction": "Hi.", "completions": [rated("a", t, 3, 7, honesty="3") for t in ("hi", "ho")]},
    {"source": "flan", "instruction": "One.", "completions": [rated("a", "x", 3.0, 7.0, honesty="3")]},
]


def test_ratings_make_pairs_with_margins(tmp_path: Path) -> None:
    report, rows = read(write_lines(tmp_path / "uf.jsonl", FEEDBACK), tmp_path)
    # Means over the aspects that are rated: 5, 4, 2.5 and 4.
    assert column(rows, "query", "chosen", "rejected", "margin") == [
        ("Count.", "2", "two", 1.0),
        ("Count.", "2", "3", 2.5),
        ("Count.", "2", "zwei", 1.0),
        ("Count.", "two", "3", 1.5),
        ("Count.", "zwei", "3", 1.5),
    ]
    assert rows[0]["metadata"] == {"chosen_model": "a", "rejected_model": "b"}
    assert {row["source"] for row in rows} == {"ultrafeedback/flan"}
    assert refused(tmp_path) == [
        (2, "all completions have the same rating: they show no preference"),
        (3, "an `instruction` and two completions with ratings are needed"),
    ]
    assert len(report.warnings) == 1
    assert report.warnings[0].endswith("(--scorer chooses another); 2 pairs with equal ratings were left out")


@pytest.mark.parametrize(
    ("scorer", "pairs"),
    [
        ("overall_score", [("two", "2", 8), ("two", "3", 7), ("two", "zwei", 5), ("3", "2", 1), ("zwei", "2", 3),
                           ("zwei", "3", 2)]),
        ("honesty", [("3", "two", 1), ("zwei", "two", 1)]),
    ],
)  # fmt: skip
def test_another_rating_can_order_pairs(tmp_path: Path, scorer: str, pairs: list[tuple[str, str, float]]) -> None:
    _, rows = read(write_lines(tmp_path / "uf.jsonl", FEEDBACK), tmp_path, scorer=scorer)
    assert sorted(column(rows, "chosen", "rejected", "margin")) == sorted(pairs)
    with pytest.raises(ConfigError, match=r"no rating 'honest' \(did you mean 'honesty'\?\)"):
        read(tmp_path / "uf.jsonl", tmp_path, scorer="honest")


def test_one_pair_of_rewardbench(tmp_path: Path) -> None:
    row = {"prompt": "Sky?", "chosen": "Blue.", "chosen_model": "m", "rejected": "Green.", "rejected_model": "n"}
    report, rows = read(write_lines(tmp_path / "rb.jsonl", [row | {"subset": "alpaca", "id": 7}]), tmp_path)
    assert column(rows, "pair_id", *PAIR, "source") == [("alpaca/7", "Sky?", "Blue.", "Green.", "rewardbench/alpaca")]
    assert rows[0]["metadata"] == {"chosen_model": "m", "rejected_model": "n"}
    assert [f["format"] for f in report.files] == ["rewardbench"]


TIES = {"id": "7", "prompt": "Sky?", "chosen": ["Blue.", "Azure."], "rejected": ["Green.", "Red."], "subset": "Ties"}


def test_several_completions_of_rewardbench_2(tmp_path: Path) -> None:
    _, rows = read(write_lines(tmp_path / "rb.jsonl", [TIES]), tmp_path)
    assert column(rows, "pair_id", *PAIR) == [
        ("Ties/7/0-0", "Sky?", "Blue.", "Green."),
        ("Ties/7/0-1", "Sky?", "Blue.", "Red."),
        ("Ties/7/1-0", "Sky?", "Azure.", "Green."),
        ("Ties/7/1-1", "Sky?", "Azure.", "Red."),
    ]


def test_queries_of_preferences_are_counted(tmp_path: Path) -> None:
    report, _ = read(write_lines(tmp_path / "rb.jsonl", [TIES]), tmp_path)
    assert report.n_queries == 1
