"""One contract for every format: a valid file gives what it must, any other is read or refused in one line."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, run_oirl
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from mutations import check, damage, mutate
from reading import read, refused
from samples import SAMPLES, Member, Sample, arrow, deep, eval_archive, zip_bytes

import oirl
from oirl.errors import DataError
from oirl.logs.importing.pipeline import ImportReport, detect
from oirl.registry import names

ALL = list(SAMPLES.values())
BINARY = {"parquet", "arrow", "trl-parquet", "trl-arrow"}
"""Damaged files of these are read by Arrow's C++; they are imported in a process of their own."""
FUZZ = ROOT / "tests" / "fuzz" / "fuzz_formats.py"
each = pytest.mark.parametrize("sample", ALL, ids=lambda s: s.name)
textual = pytest.mark.parametrize("sample", [s for s in ALL if s.name not in BINARY], ids=lambda s: s.name)


def many(examples: int) -> Callable[[Any], Any]:
    # Seeds do not shrink; without that phase a failure is reported at once.
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


def changed(sample: str, change: Callable[[list[Any]], Any]) -> bytes:
    """Return a sample after `change` of its pieces."""
    pieces = SAMPLES[sample].pieces()
    change(pieces)
    return SAMPLES[sample].write(pieces)


def holds(folder: Path, sample: str, content: bytes, **beside: bytes) -> bool:
    """Say whether content was accepted under the name of the format; fail if the contract was broken."""
    known = SAMPLES[sample]
    return check(known.build(folder, content, beside), folder, known.format)


# Valid files


def test_every_format_has_a_sample() -> None:
    assert {s.format for s in ALL} == set(names("formats"))


@each
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_valid_file(tmp_path: Path, sample: Sample, packed: bool) -> None:
    if packed and not sample.text:
        pytest.skip("no text")
    source = sample.build(tmp_path)
    if packed:
        source = source.rename(source.with_name(source.name + ".gz"))
        source.write_bytes(gzip.compress(source.read_bytes()))
    assert detect(source).name == sample.format
    first = oirl.import_log(source, tmp_path / "a" / "log.parquet")
    second = oirl.import_log(source, tmp_path / "b" / "log.parquet", format=sample.format)
    counts = (first.rows_read, first.rows_kept, first.rows_refused, first.n_queries)
    assert counts == (sample.kept + sample.refused, sample.kept, sample.refused, sample.queries)
    assert first.fingerprint == second.fingerprint != ""
    table = pq.read_table(tmp_path / "a" / "log.parquet")
    right = sum(c is True for c in table["correct"].to_pylist()) if "correct" in table.column_names else None
    assert right == sample.right


@textual
@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"\xef\xbb\xbf" + data,
        lambda data: data.replace(b"\n", b"\r\n"),
        lambda data: data + b"\n\n",
    ],
    ids=["bom", "crlf", "blank lines"],
)
def test_other_ways_to_write_the_same_text(tmp_path: Path, sample: Sample, change: Any) -> None:
    if not sample.text and not sample.name.startswith("helm"):
        pytest.skip("no text")
    content = change(sample.write(sample.pieces()))
    source = sample.build(tmp_path, content)
    report = oirl.import_log(source, tmp_path / "log.parquet")
    assert (report.files[0]["format"], report.rows_kept) == (sample.format, sample.kept)


@each
@pytest.mark.parametrize("content", [b"", b" \n" * 200, b"\0" * 300, b"{", b"[", b"null", b"[]", b"PK\3\4"])
def test_files_with_next_to_nothing(tmp_path: Path, sample: Sample, content: bytes) -> None:
    for format in ("auto", sample.format):
        assert not check(sample.build(tmp_path, content), tmp_path, format)


@each
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
def test_utf_16_is_refused(tmp_path: Path, sample: Sample, encoding: str) -> None:
    content = sample.write(sample.pieces()).decode("latin-1").encode(encoding)
    assert not check(sample.build(tmp_path, content), tmp_path, sample.format)


# Mutated files


@textual
def test_mutated_structure(tmp_path_factory: pytest.TempPathFactory, sample: Sample) -> None:
    @many(24)
    @given(seed=st.integers(0, 2**32 - 1), auto=st.booleans())
    def run(seed: int, auto: bool) -> None:
        folder = tmp_path_factory.mktemp("case")
        files = mutate(sample, Random(seed))
        check(sample.build(folder, files.pop(""), files), folder, "auto" if auto else sample.format, one_line=False)

    run()


@textual
def test_damaged_bytes(tmp_path_factory: pytest.TempPathFactory, sample: Sample) -> None:
    whole = sample.write(sample.pieces())

    @many(10)
    @given(seed=st.integers(0, 2**32 - 1), auto=st.booleans())
    def run(seed: int, auto: bool) -> None:
        folder = tmp_path_factory.mktemp("case")
        content = damage(whole, Random(seed))
        check(sample.build(folder, content), folder, "auto" if auto else sample.format, one_line=False)

    run()


@textual
def test_truncated(tmp_path: Path, sample: Sample) -> None:
    whole = sample.write(sample.pieces())
    for size in range(1, len(whole), max(len(whole) // 17, 1)):
        check(sample.build(tmp_path, whole[:size]), tmp_path, sample.format)


@pytest.mark.parametrize("name", sorted(BINARY))
def test_mutated_tables(tmp_path: Path, name: str) -> None:
    command = [sys.executable, str(FUZZ), "--format", name, "--cases", "30", "--seconds", "30", "--keep", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [f["violations"] for f in found if f["sample"] == name] == [{}], done.stderr


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("gsm8k", ["answer"]),
        ("svamp", ["ID"]),
        ("lm-eval", ["doc", "puzzle"]),
        ("lm-eval", ["target"]),
        ("lm-eval-choice", ["target"]),
        pytest.param("promptfoo-jsonl", ["vars", "puzzle"]),
        ("promptfoo-jsonl", ["promptId"]),
        ("rewardbench", ["subset"]),
        ("ultrafeedback", ["source"]),
        ("trl", ["chosen", 0, "content"]),
        ("trl-unpaired", ["label"]),
        ("jsonl", ["metadata"]),
    ],
)
def test_values_nested_to_any_depth(tmp_path: Path, name: str, path: list[Any]) -> None:
    """What the JSON reader just accepts may be too deep for the code that goes through it afterwards."""

    def grow(pieces: list[Any]) -> None:
        for levels in range(300, 1050, 2):
            row = place = SAMPLES[name].pieces()[1]
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = deep(levels)
            pieces.append(row)

    assert holds(tmp_path, name, changed(name, grow)) or name == "svamp"  # one JSON array, too deep as a whole


# Single cases that have been bugs


@pytest.mark.parametrize("key", ["chosen", "rejected"])
def test_rewardbench_row_without_a_field(tmp_path: Path, key: str) -> None:
    assert holds(tmp_path, "rewardbench", changed("rewardbench", lambda p: p[1].pop(key)))


def test_ultrafeedback_rating_beyond_floats(tmp_path: Path) -> None:
    def change(pieces: list[Any]) -> None:
        pieces[1]["completions"][0]["annotations"]["honesty"]["Rating"] = 10**400

    assert holds(tmp_path, "ultrafeedback", changed("ultrafeedback", change))


def test_lm_eval_log_probability_beyond_floats(tmp_path: Path) -> None:
    change = changed("lm-eval-choice", lambda p: p[1]["filtered_resps"].__setitem__(0, [10**400, "False"]))
    assert holds(tmp_path, "lm-eval-choice", change)


@pytest.mark.parametrize("value", [5, True, 0.5])
def test_lm_eval_filtered_replies_of_another_type(tmp_path: Path, value: Any) -> None:
    change = changed("lm-eval-choice", lambda p: p[1].update(filtered_resps=value))
    assert holds(tmp_path, "lm-eval-choice", change)


def test_lm_eval_target_of_many_digits(tmp_path: Path) -> None:
    assert holds(tmp_path, "lm-eval-choice", changed("lm-eval-choice", lambda p: p[1].update(target="9" * 5000)))


@pytest.mark.parametrize("value", [5, ["a"], {"a": 1}])
def test_helm_reference_of_another_type(tmp_path: Path, value: Any) -> None:
    def change(pieces: list[Any]) -> None:
        for state in pieces[0]["request_states"]:
            state["instance"]["references"][0]["output"]["text"] = value

    holds(tmp_path, "helm-choice", changed("helm-choice", change))


@pytest.mark.parametrize("value", [["success"], {"a": 1}])
def test_inspect_status_of_another_type(tmp_path: Path, value: Any) -> None:
    assert holds(tmp_path, "inspect", changed("inspect", lambda p: p[0].update(status=value)))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("lm-eval", lambda p: p[1].update(filter="a\nb")),
        ("jsonl", lambda p: [r.update({"a\nb": r.pop("query")}) for r in p]),
        ("csv", lambda p: p[0].__setitem__(0, "a\nb")),
    ],
    ids=["lm-eval", "jsonl", "csv"],
)
def test_line_breaks_in_names(tmp_path: Path, name: str, change: Any) -> None:
    assert not holds(tmp_path, name, changed(name, change))


def odd_columns() -> dict[str, pa.Array]:
    twice = pa.StructArray.from_arrays([pa.array(["a", "b"])] * 2, names=["x", "x"])
    return {
        "nanoseconds": pa.array([1_700_000_000_000_000_001, None], pa.timestamp("ns")),
        "far future": pa.array([2**50, 1], pa.timestamp("s")),
        "long ago": pa.array([-(2**40), 1], pa.timestamp("s")),
        "day": pa.array([2**30, 1], pa.date32()),
        "long": pa.array([2**62, 1], pa.duration("s")),
        "time": pa.array([1, 2], pa.time64("ns")),
        "twice": twice,
    }


@pytest.mark.parametrize("kind", odd_columns())
@pytest.mark.parametrize("format", ["trl", "arrow"])
def test_tables_with_columns_that_python_has_no_values_for(tmp_path: Path, format: str, kind: str) -> None:
    """A column that no record asks for must not matter to a log, and at most refuse a file of pairs."""
    columns = {n: ["a", "b"] for n in (("query", "prompt") if format == "arrow" else ("prompt",))}
    columns |= {"chosen": ["c", "d"], "rejected": ["e", "f"]} if format == "trl" else {}
    table = pa.table(columns).append_column("x", odd_columns()[kind])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    source = SAMPLES[{"trl": "trl-arrow", "arrow": "arrow"}[format]].build(tmp_path, sink.getvalue().to_pybytes())
    taken = [check(source, tmp_path, f) for f in (format, "auto")]
    assert format == "trl" or taken == [True, True]


@pytest.mark.parametrize("name", ["parquet", "arrow", "trl-parquet", "trl-arrow"])
def test_names_of_columns_that_are_not_utf_8(tmp_path: Path, name: str) -> None:
    known = SAMPLES[name]
    word = b"tokens_out" if known.format != "trl" else b"score_chosen"
    content = known.write(known.pieces()).replace(word, b"\xff" + word[1:])
    for format in ("auto", known.format):
        check(known.build(tmp_path, content), tmp_path, format)


def test_a_template_of_braces_takes_no_time(tmp_path: Path) -> None:
    results = {"configs": {"puzzles": {"doc_to_text": "{" * 10_000}}, "config": {}}
    started = time.monotonic()
    name = "results_2026-01-02T03-04-05.678.json"
    holds(tmp_path, "lm-eval", changed("lm-eval", lambda p: None), **{name: json.dumps(results).encode()})
    assert time.monotonic() - started < 0.3


def test_a_cell_of_digits_takes_no_time(tmp_path: Path) -> None:
    content = changed("promptfoo-old-csv", lambda p: p[1].__setitem__(1, "[PASS] (" + "1" * 20_000))
    started = time.monotonic()
    holds(tmp_path, "promptfoo-old-csv", content)
    assert time.monotonic() - started < 0.3


@pytest.mark.parametrize("name", ["rewardbench", "ultrafeedback"])
def test_a_row_does_not_make_a_million_pairs(tmp_path: Path, name: str) -> None:
    def change(pieces: list[Any]) -> None:
        if name == "rewardbench":
            pieces[1].update(chosen=[f"a{i}" for i in range(120)], rejected=[f"b{i}" for i in range(120)])
        else:
            pieces[1]["completions"] = [{"response": f"a{i}", "annotations": {"x": {"Rating": i}}} for i in range(150)]

    source = SAMPLES[name].build(tmp_path, changed(name, change))
    report = oirl.import_log(source, tmp_path / "log.parquet")
    assert (report.rows_kept, report.rows_refused) == (3, 1)


# Zip archives

HEADER = json.dumps(SAMPLES["inspect-eval"].pieces()[-1]["value"]).encode()
GOOD = json.dumps(SAMPLES["inspect-eval"].pieces()[1]["value"]).encode()
OTHER = json.dumps(SAMPLES["inspect-eval"].pieces()[2]["value"]).encode()
FRAME = pa.compress(OTHER, codec="zstd", asbytes=True)


def sample_member(**more: Any) -> Member:
    return Member("samples/2_epoch_1.json", **{"data": OTHER, **more})


def archive(*more: Member) -> bytes:
    return zip_bytes([Member("header.json", HEADER), Member("samples/1_epoch_1.json", GOOD), *more])


HOSTILE = {
    "../evil": (Member("../evil", b"x"), 1, 0),
    "../ in samples": (Member("samples/../../evil_epoch_1.json", OTHER), 2, 0),
    "absolute": (Member("/oirl-evil", b"x"), 1, 0),
    "windows": (Member("C:\\evil", b"x"), 1, 0),
    "symlink": (sample_member(data=b"/etc/passwd", attributes=0o120777 << 16), 1, 1),
    "symlink beside": (Member("link", b"/etc", attributes=0o120777 << 16), 1, 0),
    "folder": (Member("samples/", b"", method=0, attributes=0o40755 << 16), 1, 0),
    "folder named like a sample": (Member("samples/2_epoch_1.json/", b"", method=0), 1, 0),
    "encrypted": (sample_member(flags=0x801), 1, 1),
    "strongly encrypted": (sample_member(flags=0x841), 1, 1),
    "wrong checksum": (sample_member(crc=1), 1, 1),
    "size too small": (sample_member(size=10), 1, 1),
    "size too large": (sample_member(size=100_000), 1, 1),
    "size of 10 GB": (sample_member(size=10 << 30), 1, 1),
    "no size": (sample_member(size=0), 1, 1),
    "method 12": (sample_member(method=12), 1, 1),
    "method 99": (sample_member(method=99), 1, 1),
    "not deflate": (sample_member(packed=b"\xff" * 200), 1, 1),
    "deflate cut off": (sample_member(packed=zlib.compress(OTHER)[2:40]), 1, 1),
    "not zstd": (sample_member(method=93, packed=b"\xff" * 200), 1, 1),
    "zstd cut off": (sample_member(method=93, packed=FRAME[: len(FRAME) // 2]), 1, 1),
    "zstd flipped": (sample_member(method=93, packed=FRAME[:20] + b"\xff\0\xff" + FRAME[23:]), 1, 1),
    "zstd of nothing": (sample_member(method=93, packed=b""), 1, 1),
    "not json": (sample_member(data=b"{" * 5000), 1, 1),
    "deep json": (sample_member(data=b"[" * 100_000 + b"]" * 100_000), 1, 1),
    "not utf-8": (sample_member(data=b'"\xff"'), 1, 1),
    "a list": (sample_member(data=b"[1]"), 1, 1),
    "same name": (Member("samples/1_epoch_1.json", OTHER), 1, 0),
    "empty name": (Member("", b"x"), 1, 0),
    "nul in the name": (Member("samples/a\0b_epoch_1.json", OTHER), 1, 0),
    "line break in the name": (Member("samples/a\nb_epoch_1.json", b"x"), 1, 0),
    "long epoch": (Member(f"samples/a_epoch_{'9' * 5000}.json", OTHER), 2, 0),
    "unicode name": (Member("samples/\U0001f600/é|*?_epoch_1.json", OTHER), 2, 0),
    "long name": (Member("samples/" + "x" * 60_000 + "_epoch_1.json", OTHER), 2, 0),
}


@pytest.mark.parametrize("kind", list(HOSTILE))
def test_hostile_members(tmp_path: Path, kind: str) -> None:
    member, kept, refused = HOSTILE[kind]
    before = Path("/oirl-evil").exists(), set(tmp_path.parent.iterdir())
    source = SAMPLES["inspect-eval"].build(tmp_path, archive(member))
    assert check(source, tmp_path, "inspect")
    report = oirl.import_log(source, tmp_path / "log.parquet")
    assert (report.rows_kept, report.rows_refused) == (kept, refused)
    assert (Path("/oirl-evil").exists(), set(tmp_path.parent.iterdir())) == before


@pytest.mark.parametrize(
    "content",
    [
        archive(Member("samples/2_epoch_1.json", OTHER, offset=0)),  # overlapping
        archive(Member("samples/2_epoch_1.json", OTHER, packed_size=1 << 30)),
        archive(Member("samples/2_epoch_1.json", OTHER, offset=0xFFFFFFF0)),
        zip_bytes([Member("header.json", HEADER, flags=0x801)]),
        zip_bytes([Member("header.json", HEADER, method=93, packed=b"\xff" * 9)]),
        zip_bytes([Member("header.json", b"[]")]),
        zip_bytes([Member("header.json", HEADER)]),
        zip_bytes([Member("readme.txt", b"x")]),
        zip_bytes([]),
        archive() + b"x" * 70_000,
        archive()[:-30],
        archive()[40:],
        zip_bytes([Member(b"\xff\xfe", b"x")]),
        zip_bytes([Member("header.json", HEADER, version=99)]),
    ],
    ids="overlap past-end far-offset encrypted bad-header header-list no-samples no-log none long-tail no-tail "
    "no-start name-not-utf8 version".split(),
)
def test_hostile_archives(tmp_path: Path, content: bytes) -> None:
    source = SAMPLES["inspect-eval"].build(tmp_path, content)
    for format in ("auto", "inspect"):
        assert not check(source, tmp_path, format)


def peak(source: Path, out: Path, format: str = "inspect") -> tuple[float, str]:
    """Import in a process of its own; return the peak of its memory in MB above that of an import, and its words."""
    code = (
        "import sys, resource, oirl, pyarrow.parquet, oirl.logs.importing.inspect_logs\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"
        "try:\n"
        "    r = oirl.import_log(*sys.argv[1:3], format=sys.argv[3])\n"
        "    said = f'{r.rows_kept} {r.rows_refused}'\n"
        "except oirl.OirlError: said = 'refused'\n"
        "print((peak() - before) / 1024, said, sep='|')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(source), str(out), format],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-500:]
    used, said = done.stdout.strip().split("|")
    return float(used), said


def bomb(method: int, size: int = 1 << 30) -> bytes:
    """Return `size` blanks, packed."""
    piece = b" " * (1 << 24)
    if method == 93:
        frame = pa.compress(piece, codec="zstd", asbytes=True)
        return frame * (size >> 24)
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    block = packer.compress(piece) + packer.flush(zlib.Z_FULL_FLUSH)  # after this, blocks stand alone
    return block * (size >> 24) + packer.flush()


@pytest.mark.parametrize("method", [8, 93], ids=["deflate", "zstd"])
@pytest.mark.parametrize("claimed", [1 << 10, 10 << 30], ids=["claims 1 KB", "claims 10 GB"])
def test_a_bomb_does_not_fill_the_memory(tmp_path: Path, method: int, claimed: int) -> None:
    content = archive(sample_member(method=method, packed=bomb(method), size=claimed))
    source = SAMPLES["inspect-eval"].build(tmp_path, content)
    used, said = peak(source, tmp_path / "log.parquet")
    assert said == "1 1"
    assert used < 200


def test_many_large_members_do_not_fill_the_memory(tmp_path: Path) -> None:
    value = json.loads(OTHER)
    # Less than 200 times its size, or a member would be refused unread.
    value["store"] = "x" * (16 << 20) + Random(0).randbytes(100_000).hex()
    packed = pa.compress(json.dumps(value).encode(), codec="zstd", asbytes=True)
    size = len(json.dumps(value))
    crc = zlib.crc32(json.dumps(value).encode())
    members = [
        Member(f"samples/{i}_epoch_1.json", b"", method=93, packed=packed, size=size, crc=crc) for i in range(24)
    ]
    source = SAMPLES["inspect-eval"].build(tmp_path, archive(*members))
    assert source.stat().st_size < 4 << 20
    used, said = peak(source, tmp_path / "log.parquet")
    assert said == "1 23"  # all are read: they are repeats of one sample
    assert used < 250


# Saved data sets


def saved(folder: Path, name: Any) -> Path:
    inside = folder / "set"
    inside.mkdir()
    (inside / "dataset_info.json").write_text("{}")
    (inside / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    (inside / "data-0.arrow").write_bytes(SAMPLES["arrow"].write(SAMPLES["arrow"].pieces()))
    (folder / "secret.arrow").write_bytes(arrow([{"query": "secret", "prompt": "p"}]))
    (inside / "link.arrow").symlink_to(folder / "secret.arrow")
    return inside


def test_a_saved_data_set(tmp_path: Path) -> None:
    assert check(saved(tmp_path, "data-0.arrow"), tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "../secret.arrow",
        "data-0.arrow/../../secret.arrow",
        "link.arrow",
        "/etc/passwd",
        "",
        ".",
        "..",
        "~/x",
        5,
        None,
        ["a"],
        {"a": 1},
        "missing.arrow",
        "state.json",
        pytest.param("a\nb"),
        pytest.param("a\0b"),
        pytest.param("\ud800"),
        pytest.param("x" * 300),
    ],
)
def test_a_saved_data_set_does_not_lead_out_of_its_folder(tmp_path: Path, name: Any) -> None:
    assert not check(saved(tmp_path, name), tmp_path)


@pytest.mark.parametrize("state", [b"", b"{", b"[]", b"null", b'{"_data_files": 5}', b'{"_data_files": "ab"}', b"\xff"])
def test_a_damaged_state(tmp_path: Path, state: bytes) -> None:
    folder = saved(tmp_path, "data-0.arrow")
    (folder / "state.json").write_bytes(state)
    assert not check(folder, tmp_path)


# The command line

WORST: dict[str, Callable[[Sample], bytes]] = {
    "cut": lambda s: s.write(s.pieces())[:25],
    "deep": lambda s: b"[" * 50_000,
    "nul": lambda s: b"\0" * 1000,
    "surrogates": lambda s: b'{"query": "\\ud800", "prompt": "p"}',
}


@pytest.mark.parametrize("format", list(names("formats")))
def test_the_command_line_says_one_line(tmp_path: Path, format: str) -> None:
    sample = next(s for s in ALL if s.format == format)
    kind = list(WORST)[list(names("formats")).index(format) % len(WORST)]
    source = sample.build(tmp_path, WORST[kind](sample))
    done = run_oirl("import", source, "--out", tmp_path / "x.parquet", "--format", format)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert source.name in done.stderr or "no such" in done.stderr
    assert not (tmp_path / "x.parquet").exists()


@pytest.mark.parametrize(
    "sample",
    ALL,
    ids=lambda s: s.name,
)
def test_errors_are_ours(tmp_path: Path, sample: Sample) -> None:
    """Each worst case of each format, without the time that a process takes."""
    for make in WORST.values():
        holds(tmp_path, sample.name, make(sample))


def test_a_report_with_odd_text_can_be_printed(tmp_path: Path) -> None:
    content = changed("gepa", lambda p: p[0]["val_subscores"].__setitem__(0, {"a\ud800": "x", "b": 1.0}))
    source = SAMPLES["gepa"].build(tmp_path, content)
    done = run_oirl("import", source, "--out", tmp_path / "x.parquet")
    assert (done.returncode, done.stderr.count("Traceback")) == (0, 0)


def test_archives_of_no_kind_are_not_recognised(tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(eval_archive(8)(SAMPLES["inspect-eval"].pieces()))
    with pytest.raises(DataError, match="not recognised"):
        detect(tmp_path / "x.zip")


# Files made to fill memory


SPACES = b" " * (17 << 20)
"""Packed, 17 MiB of these are 17 KiB: a thousandth."""


def unpacked(folder: Path, name: str, content: bytes) -> ImportReport:
    assert len(content) < 200_000
    (folder / name).write_bytes(content)
    return read(folder / name, folder)[0]


@pytest.mark.parametrize(
    ("name", "start", "end"),
    [
        ("rows.json.gz", b'[{"query": "q", "prompt": "p"}', b"]"),
        ("pairs.json.gz", b'[{"chosen": "The sky is blue.", "rejected": "The sky is red."}', b"]"),
        ("candidates.json.gz", b'{"candidates": ["a"], "val_subscores": [[1]]', b"}"),
        ("out.json.gz", b'{"evalId": "e", "results": {"results": []}', b"}"),
        ("log.json.gz", b'{"version": 2, "status": "success", "eval": {"eval_id": "e"}, "samples": []', b"}"),
    ],
)
def test_a_packed_document_that_unpacks_to_more_than_200_times_its_size_is_an_error(
    tmp_path: Path, name: str, start: bytes, end: bytes
) -> None:
    content = gzip.compress(start + SPACES + end, 1)
    with pytest.raises(DataError, match=f"{name} unpacks to more than 200 times its size; is it made to fill memory"):
        unpacked(tmp_path, name, content)
    assert not (tmp_path / "out" / "log.parquet").exists()


def test_a_small_document_may_be_packed_as_well_as_it_can(tmp_path: Path) -> None:
    content = gzip.compress(b'[{"query": "q", "prompt": "p"}' + b" " * (1 << 20) + b"]")
    assert unpacked(tmp_path, "rows.json.gz", content).rows_kept == 1


@pytest.mark.parametrize("member", ["samples/2_epoch_1.json", "header.json"])
@pytest.mark.parametrize("method", [8, 93])
def test_a_member_that_unpacks_to_more_than_200_times_its_size_is_refused(
    tmp_path: Path, member: str, method: int
) -> None:
    members = []
    for piece in SAMPLES["inspect-eval"].pieces()[1:]:  # without the journal, which may stand for the header
        data = json.dumps(piece["value"]).encode() + (SPACES if piece["name"] == member else b"")
        members.append(Member(piece["name"], data, method))
    content = zip_bytes(members)
    reason = "it unpacks to more than 200 times its size, as if made to fill memory"
    if member == "header.json":
        with pytest.raises(DataError, match=r"log\.eval is a zip archive, but not a log of Inspect AI"):
            unpacked(tmp_path, "log.eval", content)
    else:
        assert unpacked(tmp_path, "log.eval", content).rows_kept == 3
        assert [reason in why for _, why in refused(tmp_path)] == [True]


@pytest.mark.parametrize("sample", ["lm-eval", "promptfoo-jsonl", "openai-evals", "trl", "trl-unpaired", "hh-rlhf"])
def test_a_line_of_more_than_4_million_values_is_refused(tmp_path: Path, sample: str) -> None:
    made = SAMPLES[sample]
    good = made.write(made.pieces()).splitlines(keepends=True)
    line = good[-1].rstrip()[:-1] + b', "x": [' + b"0," * 4_000_001 + b"0]}\n"
    content = gzip.compress(b"".join([*good, line]), 1)
    report = unpacked(tmp_path, made.file + ".gz", content)
    assert refused(tmp_path) == [(len(good) + 1, "a line of more than 4,000,000 values")]
    assert report.rows_kept == made.kept


def test_a_first_line_of_more_than_4_million_values_is_refused(tmp_path: Path) -> None:
    made = SAMPLES["lm-eval"]
    first, *others = made.write(made.pieces()).splitlines(keepends=True)
    line = first.rstrip()[:-1] + b', "x": [' + b"[]," * 2_000_001 + b"0]}\n"
    unpacked(tmp_path, made.file + ".gz", gzip.compress(b"".join([line, *others]), 1))
    assert refused(tmp_path) == [(1, "a line of more than 4,000,000 values")]
