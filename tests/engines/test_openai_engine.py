"""The engine `openai` against a server that fails in every way: nothing lost, nothing doubled, nothing forever."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import pytest
from conftest import ROOT

import oirl
from oirl.engines import openai_engine
from oirl.engines.base import Completion, EngineError, Request, Sampling, derive_seed
from oirl.engines.collecting import CollectReport, collect
from oirl.engines.openai_engine import OpenAIEngine
from oirl.engines.opening import open_engine
from oirl.engines.spending import Budget
from oirl.errors import ConfigError, OirlError
from oirl.logs.rendering import messages
from oirl.records import Query

pytest.importorskip("openai")
sys.path.insert(0, str(Path(__file__).parent))  # as pytest does it, but not for mypy and not with importlib
from faulty_server import (
    CUT,
    END,
    FINGERPRINT,
    HANG,
    HTML,
    QUOTA,
    RESET,
    WRONG_JSON,
    Asked,
    Fault,
    FaultyServer,
    answer,
    changed,
    changed_choice,
    drip,
    error,
    logprob,
    reply,
    slow,
    text_of,
    token_id,
    words,
)

T = TypeVar("T")
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")

QUERIES = [
    Query(f"q{i}", f"What is {7 * i + 1} + {i * i % 11}?", answer=str(7 * i + 1 + i * i % 11)) for i in range(12)
]
PROMPTS = [("bare", "{query}"), ("system", "You add numbers."), ("steps", "Think step by step.\n{query}\nSo:")]
KEY = "sk-a-very-secret-key-0815"
THREADS_BEFORE: list[threading.Thread] = []
TOTAL = len(QUERIES) * len(PROMPTS)

TRANSIENT: dict[str, Fault] = {
    "429 and seconds": error(429, "slow down", retry_after="0.1"),
    "429 and no seconds": error(429, "slow down"),
    "429 and a date": error(429, "slow down", retry_after="Wed, 21 Oct 2037 07:28:00 GMT"),
    "429 and nonsense": error(429, "slow down", retry_after="soon"),
    "429 and nan": error(429, "slow down", retry_after="nan"),
    "429 and inf": error(429, "slow down", retry_after="inf"),
    "429 and below 0": error(429, "slow down", retry_after="-7"),
    "408": error(408),
    "409": error(409),
    "425": error(425),
    "500": error(500),
    "502 in HTML": Fault(502, HTML.body, HTML.headers),
    "503 and seconds": error(503, retry_after="0.1"),
    "529": error(529),
    "reset": RESET,
    "cut": CUT,
    "cut error": Fault(500, b'{"error": {"message": "x"}}', how="cut"),
    "no gzip": Fault(headers={"Content-Encoding": "gzip"}),
    "no length": Fault(headers={"Content-Length": "many"}),
    "no UTF-8": Fault(body=b'{"choices": "\xff\xfe"}'),
    "empty": reply(""),
    "wrong JSON": WRONG_JSON,
    "HTML": HTML,
    "null": reply(None),
    "list": reply([]),
    "number": reply(5),
    "error in 200": reply({"error": {"message": "upstream died", "code": 502}}),
    "choices null": reply({"choices": None}),
    "choices missing": reply({"id": "x"}),
    "choices a text": changed(choices="abc"),
    "no choice": changed(choices=[]),
    "a choice too many": Fault(change=lambda right: right | {"choices": right["choices"] * 2}),
    "a choice without text": changed(choices=[{"index": 0, "finish_reason": "stop"}]),
    "a choice that is null": changed(choices=[None]),
    "a choice that is a text": changed(choices=["12"]),
    "a message that is a text": changed(choices=[{"index": 0, "finish_reason": "stop", "message": "12"}]),
    "broken off": changed_choice(finish_reason="abort"),
    "slow": slow(0.05),
}
"""What passes, if it is asked again."""

ODD: dict[str, Fault] = {
    "deep JSON": reply("[" * 100_000),
    "message a text": changed_choice(message="12", text={"a": 1}),
    "content a number": changed_choice(message={"content": 12}, text=12),
    "content a list": changed_choice(message={"content": ["12"]}, text=["12"]),
    "usage a text": changed(usage="none"),
    "usage a list": changed(usage=[1]),
    "usage empty": changed(usage={}),
    "usage null": changed(usage=None),
    "counts texts": changed(usage={"prompt_tokens": "12", "completion_tokens": "3"}),
    "counts null": changed(usage={"prompt_tokens": None, "completion_tokens": None}),
    "counts broken": changed(usage={"prompt_tokens": 1.5, "completion_tokens": 1e300}),
    "counts too large": changed(usage={"prompt_tokens": 10**30, "completion_tokens": 10**30}),
    "logprobs a text": changed_choice(logprobs="x"),
    "logprobs of null": changed_choice(logprobs={"content": [None], "token_logprobs": None}),
    "logprobs a number": changed_choice(logprobs={"content": 5, "token_logprobs": 5}),
    "token ids a number": changed_choice(token_ids=5),
    "token ids a text": changed_choice(token_ids="abc"),
    "prompt ids a number": changed(prompt_token_ids=5),
    "no finish reason": Fault(change=lambda right: right | {"choices": [_without_finish(right["choices"][0])]}),
    "finish reason a list": changed_choice(finish_reason=["stop"]),
    "fingerprint an object": changed(system_fingerprint={"a": [1]}),
    "half a surrogate": changed_choice(message={"content": "12 \ud83d"}, text="12 \ud83d"),
}
"""Right status, right JSON, wrong all the same: the reply may be read as far as it goes, or not count."""


def _without_finish(choice: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in choice.items() if name != "finish_reason"}


@pytest.fixture(autouse=True)
def lookups(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keep every test on this machine and free of the user's settings; return the names that were looked up."""
    for name in list(os.environ):
        if name.upper().startswith("OPENAI_") or name.upper().endswith("_PROXY"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(openai_engine, "_FIRST_WAIT_S", 0.01)
    THREADS_BEFORE[:] = threading.enumerate()
    asked: list[str] = []
    genuine = socket.getaddrinfo

    def local_only(host: Any, *arguments: Any, **named: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        if name in ("127.0.0.1", "localhost"):
            return genuine(name, *arguments, **named)
        asked.append(name)
        if name == "api.openai.com":  # nothing is sent there: what is meant for it comes to the server of the test
            return genuine("127.0.0.1", *arguments, **named)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", local_only)
    return asked


def opened(server: FaultyServer, **params: Any) -> OpenAIEngine:
    return OpenAIEngine("tiny", **{"base_url": server.url, "timeout": 10.0, "max_retries": 2} | params)


def requests(n: int, seed: int = 0) -> Iterator[Request]:
    return (Request(f"What is {i} + {i}?", derive_seed(seed, i)) for i in range(n))


def asked_text(i: int, chat: bool = True) -> str:
    text = f"What is {i} + {i}?"
    return f"user: {text}" if chat else text


def ask_one(engine: OpenAIEngine, text: str = "What is 1 + 1?", **sampling: Any) -> Completion:
    ((completion,),) = engine.generate([text], Sampling(**sampling))
    return completion


def outcome(work: Callable[[], T]) -> T | BaseException:
    """Return what a function returns or raises."""
    try:
        return work()
    except BaseException as e:
        return e


def within(seconds: float, work: Callable[[], T]) -> T:
    """Return what a function returns or raises, and fail if it takes longer."""
    found: list[T | BaseException] = []
    thread = threading.Thread(target=lambda: found.append(outcome(work)), daemon=True)
    thread.start()
    thread.join(seconds)
    if not found:
        pytest.fail(f"still not done after {seconds} s")
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


def engine_threads() -> list[threading.Thread]:
    """Return the engines' threads that this test has started and that still run."""
    return [t for t in threading.enumerate() if t not in THREADS_BEFORE and t.name.startswith("oirl-openai")]


def soon(true: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Wait until something is true; False if it does not become so."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def collected(engine: OpenAIEngine, out: Path, **settings: Any) -> CollectReport:
    return collect(engine, QUERIES, PROMPTS, out, **{"grade": "numeric"} | settings)


def rows_of(out: Path) -> list[dict[str, Any]]:
    """Return the rows of a log, without times and without the server's address, which is part of the run's id too."""
    rows = oirl.read_log(out).drop_columns(["latency_s", "created_at", "run_id"]).to_pylist()
    for row in rows:
        row["sampling"] = {k: v for k, v in json.loads(row["sampling"]).items() if k != "base_url"}
    return rows


def text_of_row(row: Mapping[str, Any]) -> str:
    return text_of({"messages": messages(row["prompt"], row["query"])})


def one_line(raised: BaseException) -> str:
    assert "\n" not in str(raised)
    assert len(str(raised)) < 600
    return str(raised)


@pytest.fixture(scope="module")
def faultless(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, list[dict[str, Any]]]:
    """Return the rows that a server without faults gives, in chat form and in plain form."""
    found = {}
    for chat in (True, False):
        out = tmp_path_factory.mktemp("faultless") / "log.parquet"
        with FaultyServer() as server, opened(server, chat=chat) as engine:
            collected(engine, out)
            assert len(server.asked) == TOTAL
        found[chat] = rows_of(out)
    return found


# Each fault alone, and all together


def test_a_faultless_log_holds_what_the_server_says(faultless: dict[bool, list[dict[str, Any]]]) -> None:
    rows = faultless[True]
    assert [(r["query_id"], r["prompt_id"]) for r in rows] == [(q.query_id, p) for q in QUERIES for p, _ in PROMPTS]
    assert [r["response"] for r in rows] == [answer(text_of_row(r)) for r in rows]
    assert [r["tokens_in"] for r in rows] == [len(words(text_of_row(r))) for r in rows]
    assert [r["tokens_out"] for r in rows] == [len(words(r["response"])) + 1 for r in rows]
    assert [r["correct"] for r in rows] == [f" {r['answer']}." in r["response"] for r in rows]
    assert {r["correct"] for r in rows} == {True, False}
    assert json.loads(rows[0]["metadata"]) == {"finish_reason": "stop", "model_fingerprint": FINGERPRINT}
    assert rows[0]["response"] != faultless[False][0]["response"]


@pytest.mark.parametrize("name", TRANSIENT)
def test_a_fault_that_passes_leaves_no_trace(
    name: str, tmp_path: Path, faultless: dict[bool, list[dict[str, Any]]]
) -> None:
    rng = random.Random(f"faults {name}")
    queries = QUERIES[:4]
    total = len(queries) * len(PROMPTS)
    hit = set(rng.sample(range(total), 5))
    faults = [TRANSIENT[name] if i in hit else None for i in range(total)]
    chat = rng.random() < 0.5
    with FaultyServer(faults) as server, opened(server, chat=chat, concurrency=6, max_retries=6) as engine:
        report = collect(engine, queries, PROMPTS, tmp_path / "log.parquet", grade="numeric")
    assert report.errors == {}
    assert report.stopped is None
    assert rows_of(tmp_path / "log.parquet") == faultless[chat][:total]
    assert set(server.answered().values()) == {1}  # no answer is paid for twice
    assert len(server.answered()) == total
    assert len(server.asked) == total + (0 if name == "slow" else len(hit))
    assert server.peak <= 6


@pytest.mark.parametrize(("name", "fault"), [("hang", HANG), ("drip", drip(0.05)), ("an hour", slow(3600))])
def test_a_reply_that_never_ends_is_asked_for_again(
    name: str, fault: Fault, tmp_path: Path, faultless: dict[bool, list[dict[str, Any]]]
) -> None:
    hit = set(random.Random(name).sample(range(TOTAL), 4))
    faults = [fault if i in hit else None for i in range(TOTAL)]
    with FaultyServer(faults) as server, opened(server, timeout=0.5, max_retries=6) as engine:
        report = collected(engine, tmp_path / "log.parquet")
        assert soon(lambda: server.open == 0)  # the connections of what was given up are closed
    assert report.errors == {}
    assert rows_of(tmp_path / "log.parquet") == faultless[True]


def plan(seed: int, faults: Sequence[Fault], most: int) -> Callable[[Asked], Fault | None]:
    """Return up to `most` faults for the first requests of each text, drawn by a seed and the text."""

    tries: Counter[str] = Counter()

    def fault(asked: Asked) -> Fault | None:
        rng = random.Random(f"{seed} {asked.text}")
        drawn = [rng.choice(faults) for _ in range(rng.randint(0, most))]
        tries[asked.text] += 1
        return drawn[tries[asked.text] - 1] if tries[asked.text] <= len(drawn) else None

    return fault


@pytest.mark.parametrize(("seed", "chat", "concurrency"), [(0, True, 2), (1, True, 8), (2, False, 64)])
def test_a_mix_of_all_faults_gives_the_faultless_log(
    seed: int, chat: bool, concurrency: int, tmp_path: Path, faultless: dict[bool, list[dict[str, Any]]]
) -> None:
    faults = [*TRANSIENT.values(), HANG, drip(0.05)]
    with (
        FaultyServer(plan(seed, faults, 3)) as server,
        opened(server, chat=chat, concurrency=concurrency, timeout=0.4, max_retries=6) as engine,
    ):
        report = collected(engine, tmp_path / "log.parquet")
    assert report.errors == {}
    assert rows_of(tmp_path / "log.parquet") == faultless[chat]
    assert len(server.asked) > TOTAL
    assert list(tmp_path.iterdir()) == [tmp_path / "log.parquet"]


# Faults that do not pass


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (error(500, "out of\nmemory"), "status 500: out of memory"),
        (error(429, "slow down", retry_after="0"), "status 429: slow down"),
        (RESET, "onnection"),
        (CUT, "onnection"),
        (HTML, "broken reply"),
        (WRONG_JSON, "broken reply"),
        (HANG, "no reply within 0.3 s"),
        (drip(0.05), "no reply within 0.3 s"),
    ],
)
def test_tries_are_bounded_and_the_item_fails_alone(fault: Fault, reason: str) -> None:
    bad = asked_text(1)
    with (
        FaultyServer(lambda asked: fault if asked.text == bad else None) as server,
        opened(server, timeout=0.3 if "0.3" in reason else 10.0) as engine,
    ):
        found = dict(engine.stream(requests(4), Sampling()))
    assert Counter(asked.text for asked in server.asked)[bad] == 3
    assert [found[i][0].text for i in (0, 2, 3)] == [answer(asked_text(i)) for i in (0, 2, 3)]
    (failed,) = found[1]
    assert failed.text is None
    assert not failed.refused
    assert failed.error is not None
    assert reason in failed.error
    assert failed.error.endswith("tried 3 times")
    assert "\n" not in failed.error


@pytest.mark.parametrize("max_retries", [0, 1])
def test_so_many_retries_as_are_asked_for(max_retries: int) -> None:
    with FaultyServer(lambda _: error(500)) as server, opened(server, max_retries=max_retries) as engine:
        failed = ask_one(engine)
    assert failed.error == f"status 500: the server is unwell; tried {max_retries + 1} times"
    assert len(server.asked) == max_retries + 1


def test_what_fails_for_long_stands_in_the_log_and_is_made_by_the_same_command_later(
    tmp_path: Path, faultless: dict[bool, list[dict[str, Any]]]
) -> None:
    out = tmp_path / "log.parquet"
    bad = text_of_row(faultless[True][5])
    with FaultyServer(lambda asked: error(503) if asked.text == bad else None) as server, opened(server) as engine:
        report = collected(engine, out)
        assert report.errors == {"status 503: the server is unwell; tried 3 times": 1}
        assert report.progress.failed == 1
        rows = rows_of(out)
        assert rows[5]["response"] is None
        assert rows[5]["correct"] is None
        assert json.loads(rows[5]["metadata"]) == {"error": "status 503: the server is unwell; tried 3 times"}
        assert rows[:5] + rows[6:] == faultless[True][:5] + faultless[True][6:]
        assert Counter(asked.text for asked in server.asked)[bad] == 6  # once more, when all others are done
        server.faults, before = (), len(server.asked)
        assert collected(engine, out).errors == {}
        assert [asked.text for asked in server.asked[before:]] == [bad]
    assert rows_of(out) == faultless[True]


@pytest.mark.parametrize("status", [400, 413, 422])
@pytest.mark.parametrize("chat", [True, False])
def test_a_refused_request_fails_alone_and_is_not_tried_again(status: int, chat: bool) -> None:
    bad = asked_text(1, chat)
    fault = error(status, "This prompt\nis too long", code="context_length_exceeded")
    with (
        FaultyServer(lambda asked: fault if asked.text == bad else None) as server,
        opened(server, chat=chat) as engine,
    ):
        found = dict(engine.stream(requests(4), Sampling(n=2)))
    assert Counter(asked.text for asked in server.asked)[bad] == 1
    assert len(server.asked) == 4
    assert [c.text for i in (0, 2, 3) for c in found[i]] == [
        answer(asked_text(i, chat), choice) for i in (0, 2, 3) for choice in (0, 1)
    ]
    for failed in found[1]:
        assert failed.refused
        assert failed.text is None
        assert failed.error == f"status {status}: This prompt is too long"


def test_refused_rows_stand_in_the_log(tmp_path: Path, faultless: dict[bool, list[dict[str, Any]]]) -> None:
    bad = {text_of_row(row) for row in faultless[True][::5]}
    with (
        FaultyServer(lambda asked: error(400, "no") if asked.text in bad else None) as server,
        opened(server) as engine,
    ):
        report = collected(engine, tmp_path / "log.parquet")
    assert report.errors == {"status 400: no": len(bad)}
    assert len(server.asked) == TOTAL
    for row, right in zip(rows_of(tmp_path / "log.parquet"), faultless[True], strict=True):
        assert row["response"] == (None if text_of_row(right) in bad else right["response"])


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": "no room for it"}},
        {"object": "error", "message": "no room for it", "code": 400},
        {"error": "no room for it"},
        {"detail": "no room for it"},
        "no room for it",
    ],
    ids=["OpenAI", "vLLM", "Ollama", "FastAPI", "text"],
)
def test_the_servers_own_words_are_kept(body: Any) -> None:
    content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    with FaultyServer([Fault(400, content)]) as server, opened(server) as engine:
        failed = ask_one(engine)
    assert failed.refused
    assert failed.error == "status 400: no room for it"


@pytest.mark.parametrize(
    "fault",
    [error(401, "no such key"), error(403, "not for you"), error(404, "no such model"), QUOTA],
    ids=["401", "403", "404", "quota"],
)
def test_no_access_ends_the_run_and_keeps_what_is_on_its_way(
    fault: Fault, tmp_path: Path, faultless: dict[bool, list[dict[str, Any]]]
) -> None:
    out, journal = tmp_path / "log.parquet", tmp_path / "log.parquet.journal"
    faults: list[Fault | None] = [None] * 6 + [slow(0.4), slow(0.4), fault, slow(0.4), slow(0.4)]
    with FaultyServer(faults) as server, opened(server, concurrency=5) as engine:
        with pytest.raises(EngineError) as raised:
            collected(engine, out)
        message = one_line(raised.value)
        assert server.url in message
        assert json.loads(fault.body or b"")["error"]["message"] in message
        assert str(fault.status) in message
        assert not out.exists()
        assert sum(asked.text == server.asked[8].text for asked in server.asked) == 1
        kept = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
        assert Counter(map(text_of_row, kept)) == server.answered()  # all that was paid for is there, once
        assert len(kept) >= 8
        assert len(server.asked) <= 13  # those on their way, nothing after
        before = len(server.asked)
        collected(engine, out)
        assert not {asked.text for asked in server.asked[before:]} & set(map(text_of_row, kept))
    assert rows_of(out) == faultless[True]
    assert not journal.exists()


def test_no_access_does_not_wait_for_requests_that_have_not_begun() -> None:
    with (
        FaultyServer([error(401, "no such key")] * 9) as server,
        opened(server, concurrency=4, requests_per_minute=150) as engine,
        pytest.raises(EngineError, match="no such key"),
    ):
        list(engine.stream(requests(9), Sampling()))
    assert len(server.asked) == 1


def test_no_access_does_not_wait_for_requests_that_would_be_tried_again() -> None:
    """What the server has put off for half a minute is not on its way."""
    faults = [error(429, retry_after="30"), Fault(401, error(401, "no such key").body, after_s=0.3)]
    with (
        FaultyServer(faults) as server,
        opened(server, concurrency=2) as engine,
        pytest.raises(EngineError, match="no such key"),
    ):
        within(10, lambda: list(engine.stream(requests(9), Sampling())))
    assert len(server.asked) == 2


def test_an_engine_goes_on_after_a_run_without_access() -> None:
    with FaultyServer([error(401, "no such key")], vllm=True) as server, opened(server) as engine:
        with pytest.raises(EngineError, match="no such key"):
            list(engine.stream(requests(1), Sampling()))
        assert engine.describe()["server_version"] == "0.11.0"
        assert engine.score([[5]], [[6]]) == [[logprob(6)]]
        assert ask_one(engine).error is None


def test_a_server_that_only_fails_is_given_up(tmp_path: Path) -> None:
    out = tmp_path / "log.parquet"
    with FaultyServer([None] * 8 + [error(500)] * 999) as server, opened(server, max_retries=1) as engine:
        with pytest.raises(EngineError, match="20 requests in a row failed, the last with: status 500") as raised:
            collected(engine, out)
        one_line(raised.value)
        assert len(server.asked) <= 8 + 2 * (20 + 16)
        assert len((tmp_path / "log.parquet.journal").read_text().splitlines()) == 1 + 8
        server.faults = ()
        assert collected(engine, out).progress.done == TOTAL


# Replies of another shape


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("name", ODD)
def test_an_odd_reply_does_not_end_the_run(name: str, chat: bool, tmp_path: Path) -> None:
    """It may count as far as it can be read, or fail; the others are not touched, and the log is valid."""
    out, seen = tmp_path / "log.parquet", set()

    def fault(asked: Asked) -> Fault | None:
        if QUERIES[1].query in asked.text:
            seen.add(asked.text)
            return ODD[name]
        return None

    with FaultyServer(fault) as server, opened(server, chat=chat, max_retries=1) as engine:
        collect(engine, QUERIES[:2], PROMPTS[:2], out, grade="numeric", sampling=Sampling(logprobs=True))
        found = dict(engine.stream(requests(1), Sampling(logprobs=True)))
    assert len(seen) == 2
    rows = rows_of(out)
    assert len(rows) == 4
    for row in rows:
        text = text_of_row(row) if chat else None
        if row["query_id"] != "q1":
            assert row["response"] is not None
            assert text is None or row["response"] == answer(text)
        elif row["response"] is None:
            assert "broken" in json.loads(row["metadata"])["error"]
    assert found[0][0].text == answer(asked_text(0, chat))


@pytest.mark.parametrize("name", [name for name in ODD if "surrogate" not in name])
def test_an_odd_reply_of_vllm_gives_a_completion_of_the_right_types(name: str) -> None:
    with FaultyServer(lambda _: ODD[name], vllm=True) as server, opened(server, max_retries=0) as engine:
        found = ask_one(engine, logprobs=True)
    assert found.text is None or isinstance(found.text, str)
    assert (found.text is None) == (found.error is not None)
    for ids in (found.token_ids, found.prompt_ids):
        assert ids is None or all(isinstance(i, int) for i in ids)
    assert found.logprobs is None or all(isinstance(value, float) for value in found.logprobs)
    for count in (found.tokens_in, found.tokens_out):
        assert count is None or (isinstance(count, int) and count >= 0)


@pytest.mark.parametrize(
    "fault",
    [
        error(404),
        error(405),
        reply({"data": []}),
        reply({"data": None}),
        reply({"object": "list"}),
        reply({"data": [None]}),
        reply({"data": ["tiny"]}),
        reply({"data": [{"name": "tiny"}]}),
        reply({"data": [{"id": 5}]}),
        reply({"data": {"tiny": {}}}),
    ],
)
def test_a_server_that_does_not_list_its_models_as_it_should_may_have_them(fault: Fault) -> None:
    with FaultyServer(list_faults=lambda _: fault) as server, opened(server, max_retries=1) as engine:
        assert ask_one(engine).error is None


@pytest.mark.parametrize("fault", [HTML, reply([]), reply(None), WRONG_JSON, reply("[" * 100_000)])
def test_a_list_of_models_that_cannot_be_read_is_an_error_of_one_line_at_most(fault: Fault) -> None:
    with FaultyServer(list_faults=lambda _: fault) as server:
        try:
            with opened(server, max_retries=1) as engine:
                assert ask_one(engine).error is None
        except EngineError as e:
            assert server.url in one_line(e)  # noqa: PT017


# Waiting


def test_all_requests_wait_as_long_as_the_server_asks() -> None:
    faults = [error(429, retry_after="1"), slow(0.5), slow(0.5), slow(0.5)]
    with FaultyServer(faults) as server, opened(server, concurrency=4) as engine:
        found = dict(engine.stream(requests(12), Sampling()))
    assert all(completion.error is None for (completion,) in found.values())
    first = server.asked[0].at
    later = [asked.at - first for asked in server.asked[4:]]
    assert len(later) == 9
    assert 1.0 <= min(later) < 5


def test_requests_whose_turn_was_fixed_before_wait_too() -> None:
    with (
        FaultyServer([error(429, retry_after="1")]) as server,
        opened(server, concurrency=4, requests_per_minute=600) as engine,
    ):
        list(engine.stream(requests(8), Sampling()))
    first, *later = (asked.at for asked in server.asked)
    assert min(later) - first >= 1.0
    assert max(later) - min(later) >= 0.6  # and do not come all at once


def test_a_server_that_is_busy_is_waited_for() -> None:
    with FaultyServer([error(503, retry_after="0.6")]) as server, opened(server) as engine:
        assert ask_one(engine).error is None
    assert server.asked[1].at - server.asked[0].at >= 0.6


def test_no_server_can_ask_for_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_engine, "_LONGEST_WAIT_S", 0.3)
    with FaultyServer([error(429, retry_after="3600")]) as server, opened(server) as engine:
        assert within(10, lambda: ask_one(engine)).error is None
    assert server.asked[1].at - server.asked[0].at >= 0.3


@pytest.mark.parametrize("nonsense", ["soon", "", "nan", "inf", "-inf", "1e999", "-60", "0x3c", "½"])
def test_nonsense_is_not_waited_for(nonsense: str) -> None:
    with FaultyServer([error(429, retry_after=nonsense)]) as server, opened(server) as engine:
        assert within(10, lambda: ask_one(engine)).error is None


def test_waits_double(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_engine, "_FIRST_WAIT_S", 0.08)
    with FaultyServer([error(500)] * 4) as server, opened(server, max_retries=4) as engine:
        assert ask_one(engine).error is None
    gaps = [b.at - a.at for a, b in pairwise(server.asked)]
    assert all(gap >= shortest for gap, shortest in zip(gaps, (0.04, 0.08, 0.16, 0.32), strict=True))
    assert sum(gaps) < 10


def test_waits_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_engine, "_LONGEST_WAIT_S", 0.02)
    with FaultyServer([error(500)] * 12) as server, opened(server, max_retries=12) as engine:
        assert ask_one(engine).error is None
    assert server.asked[-1].at - server.asked[0].at < 10  # without it: 15 at the least


def test_retries_are_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_engine, "_FIRST_WAIT_S", 0.4)
    faults = [error(500)] * 12
    with FaultyServer(faults, latency_s=0.01) as server, opened(server, concurrency=12) as engine:
        list(engine.stream(requests(12), Sampling()))
    again = [asked.at for asked in server.asked[12:]]
    assert len(again) == 12
    assert max(again) - min(again) > 0.04  # of 0.2


@pytest.mark.parametrize("fault", [HANG, drip(0.05), slow(30)], ids=["hang", "drip", "slow"])
def test_the_timeout_is_of_the_whole_request(fault: Fault) -> None:
    with FaultyServer(lambda _: fault) as server, opened(server, timeout=0.4, max_retries=1) as engine:
        began = time.monotonic()
        failed = within(10, lambda: ask_one(engine))  # the drip alone takes 17
        seconds = time.monotonic() - began
    assert failed.error == "no reply within 0.4 s; tried 2 times"
    assert seconds >= 0.8
    assert len(server.asked) == 2


def test_a_reply_that_takes_less_than_the_timeout_is_waited_for() -> None:
    with FaultyServer([drip(0.001)]) as server, opened(server, timeout=30) as engine:
        assert ask_one(engine).text == answer(asked_text(1))
    assert len(server.asked) == 1


@pytest.mark.parametrize("concurrency", [1, 7, 40])
def test_so_many_requests_at_a_time_as_are_allowed(concurrency: int) -> None:
    with FaultyServer(lambda _: HANG) as server:
        with opened(server, concurrency=concurrency) as engine:
            stream = engine.stream(requests(99), Sampling())
            threading.Thread(target=outcome, args=(lambda: next(stream),), daemon=True).start()
            assert soon(lambda: server.open == concurrency)
            time.sleep(0.1)
            assert server.open == concurrency
        assert soon(lambda: server.open == 0)
    assert len(server.asked) == concurrency


def test_no_more_requests_at_a_time_when_some_fail() -> None:
    faults = [None, error(500), slow(0.05), CUT, RESET, HTML] * 5
    with FaultyServer(faults, latency_s=0.02) as server, opened(server, concurrency=5, max_retries=30) as engine:
        found = dict(engine.stream(requests(40), Sampling()))
    assert all(completion.error is None for (completion,) in found.values())
    assert server.peak <= 5


def test_starts_are_spaced_retries_among_them() -> None:
    with (
        FaultyServer([None, error(500), None, error(500)]) as server,
        opened(server, requests_per_minute=600) as engine,
    ):
        list(engine.stream(requests(6), Sampling()))
    starts = [asked.at for asked in server.asked]
    assert len(starts) == 8
    # The server sees each start a little later: the whole is measured, as pairs may come close.
    assert 0.6 <= starts[-1] - starts[0] < 10


# What is sent


@pytest.mark.parametrize("vllm", [True, False])
@pytest.mark.parametrize("chat", [True, False])
def test_all_settings_are_always_sent(chat: bool, vllm: bool) -> None:
    with FaultyServer(vllm=vllm) as server, opened(server, chat=chat) as engine:
        list(engine.stream([Request("What is 1 + 1?", 4711)], Sampling()))
        list(
            engine.stream(
                [Request("What is 1 + 1?", 12)],
                Sampling(max_tokens=7, temperature=0, top_p=0.9, top_k=5, stop=("\n", "##"), n=3, logprobs=True),
            )
        )
    bare, full = (asked.body for asked in server.asked)
    rendered = {"messages": [{"role": "user", "content": "What is 1 + 1?"}]} if chat else {"prompt": "What is 1 + 1?"}
    extras = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "return_token_ids": True} if vllm else {}
    settings = {"model": "tiny", "max_tokens": 512, "temperature": 1.0, "top_p": 1.0, "seed": 4711, "n": 1}
    assert {k: v for k, v in bare.items() if k != "logprobs"} == rendered | settings | extras
    settings = {"model": "tiny", "max_tokens": 7, "temperature": 0.0, "top_p": 0.9, "seed": 12, "n": 3}
    settings |= {"stop": ["\n", "##"], "logprobs": True if chat else 1}
    assert full == rendered | settings | extras | {"top_k": 5}
    assert {asked.path for asked in server.asked} == {"/v1/chat/completions" if chat else "/v1/completions"}


@pytest.mark.parametrize("chat", [True, False])
def test_logprobs_are_not_mentioned_unless_asked_for(chat: bool) -> None:
    with FaultyServer() as server, opened(server, chat=chat) as engine:
        ask_one(engine)
    assert "logprobs" not in server.asked[0].body


def test_messages_are_sent_as_they_are() -> None:
    turns = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1 + 2 ü \u2028 😀 \x00"}]
    with FaultyServer() as server, opened(server) as engine:
        (((found,)),) = engine.generate([turns], Sampling())
    assert server.asked[0].body["messages"] == turns
    assert found.text == answer(text_of({"messages": turns}))


@pytest.mark.parametrize("chat", [True, False])
def test_openai_is_sent_what_its_newer_models_take(
    chat: bool, lookups: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with FaultyServer() as server:
        with opened(server, base_url=f"http://api.openai.com:{server.port}/v1", chat=chat) as engine:
            ask_one(engine)
            ask_one(engine, temperature=0.5, top_p=0.5, stop=("\n",))
        bare, full = (asked.body for asked in server.asked)
    assert set(lookups) == {"api.openai.com"}
    limit = "max_completion_tokens" if chat else "max_tokens"
    assert set(bare) - {"logprobs"} == {"model", "messages" if chat else "prompt", limit, "n", "seed"}
    assert (full[limit], full["temperature"], full["top_p"], full["stop"]) == (512, 0.5, 0.5, ["\n"])


# What is read


@pytest.mark.parametrize("vllm", [True, False])
@pytest.mark.parametrize("chat", [True, False])
def test_all_of_a_reply_is_read(chat: bool, vllm: bool) -> None:
    text = asked_text(1, chat)
    with FaultyServer(vllm=vllm) as server, opened(server, chat=chat) as engine:
        found = ask_one(engine, logprobs=True)
        bare = ask_one(engine)
    said = answer(text)
    ids = (*map(token_id, words(said)), END)
    assert found.text == bare.text == said
    assert found.finish_reason == "stop"
    assert found.logprobs == tuple(map(logprob, ids))
    assert bare.logprobs is None
    assert found.token_ids == (ids if vllm else None)
    assert found.prompt_ids == (tuple(map(token_id, words(text))) if vllm else None)
    assert (found.tokens_in, found.tokens_out) == (len(words(text)), len(ids))
    assert found.model_fingerprint == FINGERPRINT
    assert (found.error, found.refused) == (None, False)


@pytest.mark.parametrize("vllm", [True, False])
@pytest.mark.parametrize("chat", [True, False])
def test_several_responses_to_a_text(chat: bool, vllm: bool) -> None:
    texts = [asked_text(i, chat) for i in range(5)]
    with FaultyServer([error(500)], vllm=vllm, latency_s=0.02) as server, opened(server, chat=chat) as engine:
        found = engine.generate([f"What is {i} + {i}?" for i in range(5)], Sampling(n=3, logprobs=True))
    assert [[c.text for c in some] for some in found] == [[answer(text, i) for i in range(3)] for text in texts]
    for some, text in zip(found, texts, strict=True):
        for i, completion in enumerate(some):
            ids = (*map(token_id, words(answer(text, i))), END)
            assert completion.logprobs == tuple(map(logprob, ids))
            assert completion.token_ids == (ids if vllm else None)
            assert completion.tokens_in == len(words(text))
            assert completion.tokens_out == (len(ids) if vllm else None)  # usage tells the sum of all


@pytest.mark.parametrize("choices", [0, 1, 2, 4])
def test_fewer_or_more_choices_than_asked_for_are_no_reply(choices: int) -> None:
    fault = Fault(change=lambda right: right | {"choices": (right["choices"] * 2)[:choices]})
    with FaultyServer(lambda _: fault) as server, opened(server, max_retries=1) as engine:
        (found,) = engine.generate(["What is 1 + 1?"], Sampling(n=3))
    assert len(found) == 3
    assert all(c.text is None and c.error is not None and "broken reply" in c.error for c in found)
    assert len(server.asked) == 2


def test_a_response_that_was_cut_says_so() -> None:
    with FaultyServer(vllm=True) as server, opened(server) as engine:
        cut, stopped = ask_one(engine, max_tokens=3), ask_one(engine, stop=(" The",))
    assert (cut.finish_reason, cut.tokens_out) == ("length", 3)
    assert cut.text == "".join(words(answer(asked_text(1)))[:3])
    assert stopped.finish_reason == "stop"
    assert stopped.text == answer(asked_text(1)).split(" The")[0]


def test_a_reply_that_says_nothing_is_an_empty_response() -> None:
    nothing = changed_choice(message={"role": "assistant", "content": None})
    with FaultyServer([nothing]) as server, opened(server) as engine:
        found = ask_one(engine)
    assert (found.text, found.error) == ("", None)


def test_latency_is_from_sending_to_receiving() -> None:
    """Neither the try that failed nor the wait before the next counts, nor the wait for a turn."""
    with FaultyServer([error(429, retry_after="1")], latency_s=0.2) as server, opened(server, concurrency=2) as engine:
        found = engine.generate([f"What is {i} + {i}?" for i in range(4)], Sampling())
    for (completion,) in found:
        assert completion.latency_s is not None
        assert 0.2 <= completion.latency_s < 1.0


@pytest.mark.parametrize("fault", [None, error(500), CUT])
def test_vllm_gives_the_logprobs_of_given_tokens(fault: Fault | None) -> None:
    prompts, tokens = [[5, 6, 7], [8]], [[100, 200], [300, 400, 500]]
    with FaultyServer([fault], vllm=True) as server, opened(server) as engine:
        found = engine.score(prompts, tokens)
    assert found == [[logprob(100), logprob(200)], [logprob(300), logprob(400), logprob(500)]]
    sent = [asked.body["prompt"] for asked in server.asked]
    assert [5, 6, 7, 100, 200] in sent
    assert [8, 300, 400, 500] in sent


@pytest.mark.parametrize(
    "fault",
    [
        error(400, "too long"),
        error(500),
        HTML,
        changed(choices=[]),
        changed_choice(prompt_logprobs=None, logprobs=None),
        changed_choice(prompt_logprobs=5, logprobs=5),
        changed_choice(prompt_logprobs=[None], logprobs={"token_logprobs": [None]}),
        changed_choice(prompt_logprobs=[None, {}, {}, {}], logprobs={"token_logprobs": [None] * 4}),
    ],
)
def test_scores_that_cannot_be_had_are_an_error_of_one_line(fault: Fault) -> None:
    with FaultyServer(lambda _: fault, vllm=True) as server, opened(server, max_retries=1) as engine:
        with pytest.raises(EngineError) as raised:
            engine.score([[5, 6]], [[7, 8]])
        assert server.url in one_line(raised.value)


def test_a_paused_engine_asks_nothing_more() -> None:
    paused = r"^the engine 'openai' is paused; resume it first$"
    with FaultyServer() as server, opened(server, concurrency=2) as engine:
        engine.pause()
        with pytest.raises(EngineError, match=paused):
            list(engine.stream(requests(3), Sampling()))
        assert server.asked == []
        engine.resume()
        stream = engine.stream(requests(9), Sampling())
        found = [next(stream)]
        engine.pause()
        with pytest.raises(EngineError, match=paused):
            found.extend(stream)
        assert len(found) == len(server.asked) == 2  # what was on its way is paid for
        engine.resume()
        assert len(list(engine.stream(requests(3), Sampling()))) == 3


def test_another_server_does_not_go_on_with_a_log(tmp_path: Path) -> None:
    """Both call their model `tiny`: what tells them apart is the address."""
    out = tmp_path / "log.parquet"
    with FaultyServer() as server, FaultyServer() as other:
        with opened(server) as engine:
            collected(engine, out)
        with opened(other) as engine, pytest.raises(ConfigError, match=r"base_url was .*, is .*; name another --out"):
            collected(engine, out)
        with open_engine("openai", "tiny", {"base_url": f"{server.url}/"}) as engine:
            assert collected(engine, out).progress.new == 0
        assert other.asked == []


def test_a_budget_holds_over_sessions_where_a_server_tells_no_counts(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"sampling": Sampling(max_tokens=20), "budget": Budget(1000, "tokens")}
    with FaultyServer(lambda a: changed(usage=None)) as server, opened(server) as engine:
        done = [collected(engine, tmp_path / "log.parquet", **settings).progress.done for _ in range(3)]
        assert done[0] == done[1] == done[2] == len(server.asked)
        assert done[0] < len(QUERIES) * len(PROMPTS)


def test_only_vllm_gives_the_logprobs_of_given_tokens() -> None:
    with (
        FaultyServer() as server,
        opened(server) as engine,
        pytest.raises(EngineError, match="cannot give log-probs of given tokens"),
    ):
        engine.score([[1]], [[2]])
    assert server.asked == []


@pytest.mark.parametrize("vllm", [True, False])
def test_an_engine_says_what_it_is(vllm: bool) -> None:
    import openai

    with FaultyServer(vllm=vllm) as server, opened(server, chat=False) as engine:
        assert engine.describe() == {
            "engine": "openai",
            "engine_version": openai.__version__,
            "server_version": "0.11.0" if vllm else None,
            "base_url": server.url,
            "model": "tiny",
            "model_fingerprint": "/weights/tiny",
            "chat": False,
        }


# Opening


def test_messages_do_not_go_as_plain_text() -> None:
    turns = [{"role": "user", "content": "What is 1 + 1?"}]
    with FaultyServer() as server, opened(server, chat=False) as engine:
        (first,), (second,), (third,) = engine.generate(["What is 0 + 0?", turns, "What is 2 + 2?"], Sampling())
    assert (first.text, third.text) == (answer(asked_text(0, False)), answer(asked_text(2, False)))
    assert second.refused
    assert second.error is not None
    assert "plain text" in second.error
    assert len(server.asked) == 2


def test_a_model_that_vllm_does_not_have() -> None:
    with FaultyServer(vllm=True, models=("small", "large")) as server:
        with pytest.raises(EngineError, match="has no model 'tiny'; it has: small, large") as raised:
            opened(server)
        assert server.url in one_line(raised.value)
    assert server.asked == []


def test_other_servers_need_not_list_a_model() -> None:
    with FaultyServer(models=("small", "large")) as server, opened(server) as engine:
        assert ask_one(engine).error is None


@pytest.mark.parametrize("status", [401, 403])
def test_no_access_shows_at_once(status: int) -> None:
    with FaultyServer(list_faults=[error(status, "no such key")]) as server:
        with pytest.raises(EngineError, match=f"status {status}: no such key") as raised:
            opened(server)
        assert server.url in one_line(raised.value)
    assert len(server.others) == 1


@pytest.mark.parametrize("fault", [error(503), error(429, retry_after="0"), RESET, CUT, HANG, WRONG_JSON])
def test_opening_outlasts_what_passes(fault: Fault) -> None:
    with (
        FaultyServer(list_faults=[fault, fault], vllm=True) as server,
        opened(server, timeout=0.5 if fault is HANG else 10) as engine,
    ):
        assert engine.describe()["server_version"] == "0.11.0"
        assert ask_one(engine).token_ids


@pytest.mark.parametrize("max_retries", [0, 1])
def test_a_server_that_is_down(max_retries: int) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        began = time.monotonic()
        with pytest.raises(EngineError, match=f"tried {max_retries + 1} times") as raised:
            OpenAIEngine("tiny", base_url=url, max_retries=max_retries)
        assert time.monotonic() - began < 10
    assert f"{url} does not answer" in one_line(raised.value)
    assert soon(lambda: not engine_threads())


def test_a_server_that_hangs_from_the_start() -> None:
    with (
        FaultyServer(list_faults=lambda _: HANG) as server,
        pytest.raises(EngineError, match=r"does not answer: no reply within 0\.3 s; tried 2 times"),
    ):
        within(10, lambda: opened(server, timeout=0.3, max_retries=1))


def test_a_name_that_no_one_has(lookups: list[str]) -> None:
    with pytest.raises(EngineError, match="does not answer") as raised:
        OpenAIEngine("tiny", base_url="http://nowhere.invalid/v1", max_retries=0)
    one_line(raised.value)
    assert "nowhere.invalid" in lookups


def test_openai_needs_a_key(lookups: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="needs a key: set the environment variable OPENAI_API_KEY"):
        OpenAIEngine("gpt-5")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(ConfigError, match="set the environment variable MY_KEY"):
        OpenAIEngine("gpt-5", api_key_env="MY_KEY")
    monkeypatch.setenv("MY_KEY", "")
    with pytest.raises(ConfigError, match="set the environment variable MY_KEY"):
        OpenAIEngine("gpt-5", api_key_env="MY_KEY")
    assert lookups == []
    assert not engine_threads()


def test_the_address_may_stand_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultyServer() as named, FaultyServer() as other:
        monkeypatch.setenv("OPENAI_BASE_URL", named.url)
        with OpenAIEngine("tiny") as engine:
            assert engine.describe()["base_url"] == named.url
            assert ask_one(engine).error is None
        assert len(named.asked) == 1
        with OpenAIEngine("tiny", base_url=other.url) as engine:
            ask_one(engine)
        assert (len(named.asked), len(other.asked)) == (1, 1)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:80O0/v1", "http://[half/v1", "127.0.0.1:8000/v1", "ftp://127.0.0.1/v1", "http://"]
)
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(OirlError) as raised:
        OpenAIEngine("tiny", base_url=url, max_retries=0)
    assert url in one_line(raised.value)
    assert soon(lambda: not engine_threads())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("concurrency", 0),
        ("timeout", 0),
        ("timeout", -1),
        ("timeout", float("nan")),
        ("max_retries", -1),
        ("requests_per_minute", -1),
        ("requests_per_minute", 0),
        ("retries", 3),
    ],
)
def test_parameters_that_are_not_allowed(name: str, value: Any) -> None:
    with FaultyServer() as server:
        with pytest.raises(ConfigError, match=name):
            open_engine("openai", "tiny", {"base_url": server.url, "max_retries": 0, name: value}).close()
        assert server.others == []
    assert soon(lambda: not engine_threads())


# The key


def everything_in(folder: Path) -> str:
    """Return all that files say, Parquet's columns and metadata among it."""
    said = [path.read_bytes().decode("utf-8", "replace") for path in folder.iterdir()]
    tables = [oirl.read_log(path) for path in folder.glob("*.parquet")]
    return " ".join([*said, *(f"{table.to_pylist()} {table.schema.metadata}" for table in tables)])


@pytest.mark.parametrize("name", ["OPENAI_API_KEY", "MY_KEY"])
def test_the_key_is_sent_and_not_kept(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-this-one")
    monkeypatch.setenv(name, KEY)
    faults = [error(400, "no"), error(500), CUT, RESET, *[None] * 8, error(401, "no")]
    with FaultyServer(faults) as server, opened(server, api_key_env=name) as engine:
        with pytest.raises(EngineError) as raised:
            collected(engine, tmp_path / "log.parquet")
        assert KEY not in everything_in(tmp_path) + str(raised.value) + repr(engine.describe())
        collected(engine, tmp_path / "log.parquet")
        assert KEY not in everything_in(tmp_path)
    assert {asked.headers["authorization"] for asked in server.asked + server.others} == {f"Bearer {KEY}"}


def test_a_server_of_ones_own_needs_no_key() -> None:
    with FaultyServer() as server, opened(server, api_key_env="MY_KEY") as engine:
        assert ask_one(engine).error is None


@pytest.mark.parametrize("status", [400, 401, 500])
def test_a_key_that_the_server_repeats_is_not_kept(
    status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    echo = error(status, f"Received key = {KEY}, which is none")
    with FaultyServer([None] * 8 + [echo] * 99) as server, opened(server, max_retries=0) as engine:
        try:
            said = str(collected(engine, tmp_path / "log.parquet").errors)
        except EngineError as e:
            said = str(e)
        assert "which is none" in said
        assert KEY not in said + everything_in(tmp_path)


def test_a_key_is_not_cut_before_it_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for length in (270, 280, 290, 295):
        with FaultyServer([error(400, "x" * length + f" {KEY} is none")]) as server, opened(server) as engine:
            failed = ask_one(engine)
        assert failed.error is not None
        assert KEY[:6] not in failed.error


def test_words_of_the_server_are_not_taken_for_a_key() -> None:
    said = "none of the models in this group is a nonempty one"
    with FaultyServer([error(400, said)]) as server, opened(server) as engine:
        assert ask_one(engine).error == f"status 400: {said}"


@pytest.mark.parametrize("end", ["\n", "\r", " \r\n"])
def test_a_key_with_the_end_of_its_line_is_not_shown(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a key from a file has; a header cannot hold it."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY + end)
    with FaultyServer() as server:
        try:
            with opened(server, max_retries=0) as engine:
                assert ask_one(engine).error is None
        except OirlError as e:
            assert KEY not in one_line(e)  # noqa: PT017
        assert all(asked.headers["authorization"] == f"Bearer {KEY}" for asked in server.asked)


def test_a_password_in_the_address_is_not_kept(tmp_path: Path) -> None:
    with FaultyServer() as server:
        url = server.url.replace("http://", f"http://me:{KEY}@")
        with opened(server, base_url=url) as engine:
            collected(engine, tmp_path / "log.parquet")
            assert KEY not in everything_in(tmp_path)


# The stream


def test_requests_are_pulled_only_when_there_is_room() -> None:
    pulled = 0

    def forever() -> Iterator[Request]:
        nonlocal pulled
        while True:
            pulled += 1
            yield Request(f"What is {pulled} + 1?", pulled)

    with FaultyServer() as server, opened(server, concurrency=3) as engine:
        stream = engine.stream(forever(), Sampling())
        assert pulled == 0
        for done in range(1, 30):
            next(stream)
            assert pulled <= done + 3
        stream.close()  # type: ignore[attr-defined]
        assert len(server.asked) <= 32


def test_what_is_asked_for_is_asked_at_once() -> None:
    """As long as there is room, no answer is waited for."""
    hung = {asked_text(i) for i in range(5)}
    with (
        FaultyServer(lambda asked: HANG if asked.text in hung else None) as server,
        opened(server, concurrency=6) as engine,
    ):
        stream = engine.stream(requests(99), Sampling())
        assert next(stream)[0] == 5
        assert soon(lambda: {asked.text for asked in server.asked} >= hung)
        stream.close()  # type: ignore[attr-defined]


def test_closing_early_breaks_off_what_is_running() -> None:
    with FaultyServer([None] + [HANG] * 99) as server, opened(server, concurrency=9) as engine:
        stream = engine.stream(requests(50), Sampling())
        next(stream)
        assert soon(lambda: server.open >= 8)
        began = time.monotonic()
        stream.close()  # type: ignore[attr-defined]
        assert soon(lambda: server.open == 0)
        assert time.monotonic() - began < 5
        server.faults = ()
        assert ask_one(engine).error is None  # the engine goes on


def test_closing_early_ends_waits_and_retries() -> None:
    with FaultyServer([None] + [error(429, retry_after="50")] * 3) as server, opened(server, concurrency=4) as engine:
        stream = engine.stream(requests(50), Sampling())
        next(stream)
        assert soon(lambda: len(server.asked) >= 4)
        stream.close()  # type: ignore[attr-defined]
        began = time.monotonic()
    assert time.monotonic() - began < 10


def test_an_error_of_who_asks_breaks_off_what_is_running() -> None:
    def some() -> Iterator[Request]:
        yield from requests(2)
        raise ZeroDivisionError

    with FaultyServer([HANG] * 2) as server, opened(server) as engine:
        with pytest.raises(ZeroDivisionError):
            within(10, lambda: list(engine.stream(some(), Sampling())))
        assert soon(lambda: server.open == 0)


def test_completions_come_as_they_finish_and_go_where_they_belong() -> None:
    def fault(asked: Asked) -> Fault:
        return slow(0.6 if asked.text == asked_text(0) else 0.0)

    with FaultyServer(fault) as server, opened(server, concurrency=4) as engine:
        order = [position for position, _ in engine.stream(requests(12), Sampling())]
        found = engine.generate([f"What is {i} + {i}?" for i in range(12)], Sampling())
    assert sorted(order) == list(range(12))
    assert order[-1] == 0
    assert [c.text for (c,) in found] == [answer(asked_text(i)) for i in range(12)]


def test_nothing_to_do() -> None:
    with FaultyServer() as server, opened(server) as engine:
        assert list(engine.stream([], Sampling())) == []


def test_a_text_that_cannot_be_sent_fails_alone() -> None:
    with FaultyServer() as server, opened(server) as engine:
        (good,), (bad,) = engine.generate(["What is 0 + 0?", "half a surrogate: \ud83d"], Sampling())
    assert good.text == answer(asked_text(0))
    if bad.error is not None:
        assert bad.refused  # it is the text's fault: to ask again does not help
        assert len(server.asked) == 1


# The end


def test_the_thread_ends_on_close() -> None:
    ended: list[Any] = []
    with FaultyServer([HANG] * 9) as server:
        with opened(server, concurrency=3) as engine:
            stream = engine.stream(requests(9), Sampling())
            threading.Thread(target=lambda: ended.append(outcome(lambda: next(stream))), daemon=True).start()
            assert soon(lambda: server.open == 3)
            assert len(engine_threads()) == 1
            began = time.monotonic()
        assert soon(lambda: not engine_threads())
        assert soon(lambda: server.open == 0)
        assert soon(lambda: bool(ended))  # whoever waits for a completion hears of it
        assert time.monotonic() - began < 10
    assert isinstance(ended[0], Exception)


def test_nothing_is_left_of_an_engine_that_is_closed() -> None:
    """Neither a thread that looks up names nor a file of its loop, before a garbage collection comes by."""
    import gc

    def files() -> int:
        return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0

    with FaultyServer() as server:
        with opened(server) as engine:
            ask_one(engine)
        gc.collect()
        gc.disable()
        try:
            before, threads = files(), threading.active_count()
            for _ in range(4):
                with opened(server) as engine:
                    ask_one(engine)
            assert soon(lambda: threading.active_count() <= threads, 1)
            assert files() <= before + 2
        finally:
            gc.enable()


def test_closing_twice_is_closing() -> None:
    with FaultyServer() as server:
        for _ in range(5):
            engine = opened(server)
            engine.close()
            within(10, engine.close)


def test_a_closed_engine_says_so() -> None:
    with FaultyServer() as server:
        engine = opened(server)
        engine.close()
        assert soon(lambda: not engine_threads())
        with pytest.raises(EngineError):
            within(10, lambda: list(engine.stream(requests(2), Sampling())))


# The whole command line


def oirl_generate(server: FaultyServer, folder: Path) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if not k.upper().endswith("_PROXY")}
    environment |= {"PYTHONPATH": os.pathsep.join(str(ROOT / p) for p in (".", "cli", "data")), "OPENAI_API_KEY": KEY}
    files = [
        "--queries",
        folder / "queries.jsonl",
        "--prompts",
        folder / "prompts.jsonl",
        "--out",
        folder / "log.parquet",
    ]
    params = {"base_url": server.url, "concurrency": 12, "timeout": 1}
    settings = [part for name, value in params.items() for part in ("--set", f"{name}={value}")]
    command = [sys.executable, "-m", "oirl_cli", "generate", "--engine", "openai", "--model", "tiny"]
    return subprocess.Popen(
        [*command, "--grade", "numeric", *map(str, files), *settings],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def write_inputs(folder: Path) -> None:
    folder.mkdir()
    rows = [{"query_id": q.query_id, "query": q.query, "answer": q.answer} for q in QUERIES]
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = [{"prompt_id": name, "prompt": text} for name, text in PROMPTS]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))


def journal_rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / "log.parquet.journal"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines[1:]]


def user_error(process: subprocess.Popen[str]) -> str:
    """Return the one line of an error that is the user's to mend."""
    out, said = process.communicate(timeout=60)
    assert process.returncode == 2, said
    assert out == ""
    assert "Traceback" not in said
    (line,) = (line for line in said.splitlines() if line.startswith("oirl: "))
    assert KEY not in said
    return line


@posix
def test_generate_killed_out_of_quota_and_resumed_gives_the_faultless_log(
    tmp_path: Path, faultless: dict[bool, list[dict[str, Any]]]
) -> None:
    folder, session, before = tmp_path / "run", 1, 0
    write_inputs(folder)
    passing = plan(11, [*TRANSIENT.values(), HANG, drip(0.2)], 2)
    refused = text_of_row(faultless[True][2])

    def faults(asked: Asked) -> Fault | None:
        if session == 1:
            if len(server.asked) > 12:
                return HANG  # so that there is something to kill
            return error(400, "not today") if asked.text == refused else None
        if session == 2 and len(server.asked) - before == 13:
            return QUOTA
        return passing(asked)

    with FaultyServer(faults, latency_s=0.02) as server:
        process = oirl_generate(server, folder)
        assert soon(lambda: (len(journal_rows(folder)) >= 12 and server.open > 0) or process.poll() is not None, 30)
        process.send_signal(signal.SIGKILL)
        out, said = process.communicate(timeout=30)
        assert process.returncode == -signal.SIGKILL, said
        assert not (folder / "log.parquet").exists()
        kept = {text_of_row(row) for row in journal_rows(folder) if row["response"] is not None}
        assert 11 <= len(kept) <= 12  # the refused one is among the first twelve, or not
        assert soon(lambda: server.open == 0)

        session, before = 2, len(server.asked)
        message = user_error(oirl_generate(server, folder))
        assert "exceeded your current quota" in message
        assert len(journal_rows(folder)) > 12

        session = 3
        process = oirl_generate(server, folder)
        out, said = process.communicate(timeout=60)
        assert process.returncode == 0, said
        assert f"{TOTAL} of {TOTAL} runs" in out
        assert KEY not in out + said
        assert not {asked.text for asked in server.asked[before:]} & kept  # nothing is asked for twice
    assert KEY not in everything_in(folder)
    assert rows_of(folder / "log.parquet") == faultless[True]
    assert sorted(path.name for path in folder.iterdir()) == ["log.parquet", "prompts.jsonl", "queries.jsonl"]


def test_generate_says_in_one_line_what_is_wrong(tmp_path: Path) -> None:
    write_inputs(tmp_path / "run")
    with FaultyServer(vllm=True, models=("small",)) as server:
        message = user_error(oirl_generate(server, tmp_path / "run"))
    assert message == f"oirl: {server.url} has no model 'tiny'; it has: small"
