"""The journal of a run: what a killed process leaves is taken up, and nothing else is."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import oirl.engines.journal as module
from oirl.engines.journal import Journal, check_same_run
from oirl.errors import ConfigError, DataError, WriteError

IDENTITY: dict[str, Any] = {"engine": "e", "sampling": {"temperature": 1.0, "stop": ["\n"]}, "grade": None}
ROWS: list[dict[str, Any]] = [
    {"query_id": "a", "response": "one\ntwo", "tokens_in": 3},
    {"query_id": "b", "response": None, "metadata": '{"error": "x"}'},
    {"query_id": "ü", "response": "line\u2028end 🦆 \x00 \r\n", "latency_s": 0.125},
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.parquet.journal"


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> bytes:
    with Journal(path, IDENTITY) as journal:
        for row in rows:
            journal.append(row)
    return path.read_bytes()


def left(path: Path) -> list[dict[str, Any]]:
    with Journal(path, IDENTITY) as journal:
        return journal.rows


def test_rows_are_taken_up(path: Path) -> None:
    written = write(path, ROWS[:2])
    assert len(written.splitlines()) == 3
    with Journal(path, IDENTITY) as journal:
        assert journal.rows == ROWS[:2]
        journal.append(ROWS[2])
    assert path.read_bytes().startswith(written)
    assert left(path) == ROWS


def test_a_row_is_there_at_once(path: Path) -> None:
    with Journal(path, IDENTITY) as journal:
        journal.append(ROWS[0])
        assert json.loads(path.read_bytes().split(b"\n")[1]) == ROWS[0]
        journal.append(ROWS[2])
        assert json.loads(path.read_bytes().split(b"\n")[2]) == ROWS[2]


def test_folders_are_made_and_the_file_removed(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "log.journal"
    journal = Journal(path, IDENTITY)
    assert path.is_file()
    journal.remove()
    assert not path.exists()
    journal.close()  # closing twice does no harm


def test_texts_that_are_no_unicode_are_written(path: Path) -> None:
    write(path, [{"query_id": "a", "response": "half \ud83d of a pair"}])
    assert left(path) == [{"query_id": "a", "response": "half ? of a pair"}]


def test_any_end_that_is_cut_off_leaves_whole_rows(path: Path) -> None:
    whole = write(path)
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in sorted(
        {*range(0, len(whole), 9), *(end + i for end in ends for i in (-1, 0, 1) if end + i <= len(whole))}
    ):
        path.write_bytes(whole[:cut])
        complete = max(sum(end <= cut for end in ends) - 1, 0)
        with Journal(path, IDENTITY) as journal:
            assert journal.rows == ROWS[:complete], cut
            journal.append({"query_id": "new"})
        assert left(path) == [*ROWS[:complete], {"query_id": "new"}], cut
        assert path.read_bytes().startswith(whole[: ends[complete]])


@given(st.lists(st.dictionaries(st.text(), st.text() | st.integers() | st.none(), max_size=3), min_size=1, max_size=5))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None, derandomize=True)
def test_any_rows_come_back(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    path = tmp_path / "any.journal"
    path.unlink(missing_ok=True)
    write(path, rows)
    assert left(path) == rows


@pytest.mark.parametrize("line", [b"{", b"", b"[1]", b'"text"', b"7", b"\xff\xfe{}", b'{"a": 1} {"b": 2}'])
def test_a_damaged_line_is_named(path: Path, line: bytes) -> None:
    lines = write(path).split(b"\n")
    lines[2] = line
    damaged = b"\n".join(lines)
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=rf"{path}:3: damaged: .*; delete this line to make its run again"):
        Journal(path, IDENTITY)
    assert path.read_bytes() == damaged
    del lines[2]  # what the message says helps
    path.write_bytes(b"\n".join(lines))
    assert left(path) == [ROWS[0], ROWS[2]]


@pytest.mark.parametrize("content", [b"{}\n", b'{"run": 1}\n', b'{"query": "x"}\n{"query": "y"}\n'])
def test_a_file_that_is_no_journal_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{path}:1: not the journal of a run; move the file away"):
        Journal(path, IDENTITY)
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", [b"my notes", b'{"query": "x"}\n{"query": "y"}', b"one\ntwo", b"\nnotes"])
def test_a_file_that_is_no_journal_is_left_as_it_is(path: Path, content: bytes) -> None:
    """Its last line is no half row of ours."""
    path.write_bytes(content)
    with pytest.raises(DataError):
        Journal(path, IDENTITY)
    assert path.read_bytes() == content


def test_another_run_is_refused_by_the_settings_that_differ(path: Path) -> None:
    written = write(path)
    other = {"engine": "e", "sampling": {"temperature": 0.5, "stop": ["\n"]}, "grade": "numeric"}
    with pytest.raises(ConfigError) as error:
        Journal(path, other)
    message = str(error.value)
    assert str(path) in message
    assert 'grade was null, is "numeric"' in message
    assert "temperature was 1.0, is 0.5" in message
    assert "stop" not in message
    assert "engine" not in message
    assert path.read_bytes() == written


def test_settings_that_only_one_run_has_are_named() -> None:
    with pytest.raises(ConfigError, match=r'F holds .*: prompts was "ab", is null; queries was null, is "cd"; name'):
        check_same_run("F", {"design": "x", "prompts": "ab"}, {"design": "x", "queries": "cd"})
    with pytest.raises(ConfigError) as error:
        check_same_run("F", {"model": "m" * 500}, {"model": "n"})
    assert len(str(error.value)) < 300
    check_same_run("F", {"a": {"b": 1, "c": [2]}}, {"c": [2], "b": 1.0})


def test_a_second_process_is_locked_out(path: Path) -> None:
    code = (
        "import sys\nfrom oirl.engines.journal import Journal\nfrom oirl.errors import ConfigError\n"
        "try:\n    Journal(sys.argv[1], {'engine': 'e'})\n"
        "except ConfigError as e:\n    print('refused:', e)\nelse:\n    print('opened')\n"
    )

    def other() -> str:
        command = [sys.executable, "-c", code, str(path)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    with Journal(path, {"engine": "e"}) as journal:
        journal.append(ROWS[0])
        before = path.read_bytes()
        assert other().startswith(f"refused: {path} is being written by another process")
        assert path.read_bytes() == before
        with pytest.raises(ConfigError, match="another process"):
            Journal(path, {"engine": "e"})
    assert other() == "opened\n"


def test_a_journal_that_goes_while_it_is_opened_is_made_anew(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process may end between our opening of the file and our locking it."""
    first = Journal(path, IDENTITY)
    lock = module.fcntl.flock

    def late(*arguments: Any) -> Any:
        monkeypatch.setattr(module.fcntl, "flock", lock)
        first.remove()
        return lock(*arguments)

    monkeypatch.setattr(module.fcntl, "flock", late)
    with Journal(path, IDENTITY) as second:
        second.append(ROWS[0])
        assert path.is_file(), "rows go to a file that no longer has a name"
    assert left(path) == ROWS[:1]


def test_a_journal_that_another_opens_while_it_goes_is_not_taken_from_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the lock is given up, the file may be another's."""
    first, opened = Journal(path, IDENTITY), []

    def close_and_let_in() -> None:
        monkeypatch.undo()
        first.close()
        opened.append(Journal(path, IDENTITY))

    monkeypatch.setattr(first, "close", close_and_let_in)
    first.remove()
    with opened[0] if opened else Journal(path, IDENTITY) as second:
        second.append(ROWS[0])
    assert left(path) == ROWS[:1]


def test_what_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(WriteError, match=r"cannot write .*file/log\.journal: "):
        Journal(tmp_path / "file" / "log.journal", IDENTITY)
    (tmp_path / "folder.journal").mkdir()
    with pytest.raises(WriteError, match=r"cannot write .*folder\.journal: Is a directory"):
        Journal(tmp_path / "folder.journal", IDENTITY)
    with pytest.raises(WriteError, match="cannot write"):
        Journal(tmp_path / ("n" * 300), IDENTITY)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(WriteError, match="Permission denied"):
            Journal(tmp_path / "log.journal", IDENTITY)
    finally:
        tmp_path.chmod(0o700)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let no file grow beyond a size: what a full disk does, without one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_keeps_what_is_there(path: Path) -> None:
    size = len(write(path, ROWS[:1]))
    with Journal(path, IDENTITY) as journal:
        with files_of_at_most(size + 20), pytest.raises(WriteError, match=r"what it holds stays for the next try"):
            journal.append(ROWS[1])
        assert path.stat().st_size == size + 20  # half a line got through
    assert left(path) == ROWS[:1]
    assert path.stat().st_size == size
