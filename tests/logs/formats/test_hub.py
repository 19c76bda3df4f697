"""Saved data sets and names on the hub."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.ipc as ipc
import pytest
from reading import FIXTURES, column, read

from oirl.errors import ConfigError, DataError, MissingPackageError, NotFoundError

SAVED = FIXTURES / "datasets"
TRAIN = [
    ("Two hens and one hen?", "3", "2 + 1 = <<2+1=3>>3."),
    ("Half of 2,468 nuts?", "1234", "2,468 / 2 = 1,234"),
    ('Ann says "six beans",\nBen one. Both?', "7", "6 + 1 = 7"),
]
TEST = [("Nine nuts less five?", "4", "9 - 5 = 4")]


def test_a_saved_data_set_of_two_files(tmp_path: Path) -> None:
    report, rows = read(SAVED / "one", tmp_path)
    found = [(r["query"], r["answer"], r["metadata"]["solution"]) for r in rows]
    assert found == TRAIN
    assert {(r["dataset"], r["split"]) for r in rows} == {("gsm8k", None)}
    assert (report.record, report.n_queries, report.rows_refused) == ("queries", 3, 0)
    assert [(Path(f["file"]).name, f["format"], f["rows_kept"]) for f in report.files] == [
        ("data-00000-of-00002.arrow", "gsm8k", 2),
        ("data-00001-of-00002.arrow", "gsm8k", 1),
    ]


def test_a_saved_data_set_of_two_splits(tmp_path: Path) -> None:
    _, rows = read(SAVED / "both", tmp_path)
    want = [(query, answer, split) for split, part in (("test", TEST), ("train", TRAIN)) for query, answer, _ in part]
    assert column(rows, "query", "answer", "split") == want


@pytest.mark.parametrize("name", ["../other.arrow", "sub/../../other.arrow"])
def test_a_state_that_leads_outside_is_refused(tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(SAVED / "one", tmp_path / "one")
    shutil.copy(folder / "data-00000-of-00002.arrow", tmp_path / "other.arrow")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(DataError, match="stands outside of the data set's folder"):
        read(folder, tmp_path)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": str(tmp_path / "other.arrow")}]}))
    with pytest.raises(DataError, match="stands outside of the data set's folder"):
        read(folder, tmp_path)


def test_a_link_that_leads_outside_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(SAVED / "one", tmp_path / "one")
    (folder / "data-00000-of-00002.arrow").rename(tmp_path / "other.arrow")
    (folder / "data-00000-of-00002.arrow").symlink_to(tmp_path / "other.arrow")
    with pytest.raises(DataError, match="stands outside of the data set's folder"):
        read(folder, tmp_path)


def test_a_state_that_cannot_be_followed(tmp_path: Path) -> None:
    folder = shutil.copytree(SAVED / "one", tmp_path / "one")
    (folder / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(NotFoundError, match=r"names the file .*, but it is not there"):
        read(folder, tmp_path)
    (folder / "state.json").write_text("[]")
    with pytest.raises(DataError, match="is not the state of a saved data set"):
        read(folder, tmp_path)


def test_the_hub_needs_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "datasets" else find(name, *a))
    with pytest.raises(MissingPackageError, match=r"datasets.*oirl\[data\]"):
        read("hf://gsm8k", tmp_path)


def test_a_folder_through_the_hub_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "problems"
    folder.mkdir()
    for name, part in (("train", TRAIN), ("test", TEST)):
        lines = [{"question": q, "answer": f"{solution}\n#### {a}"} for q, a, solution in part]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, rows = read(f"hf://{folder}:test", tmp_path)
    assert column(rows, "query", "answer", "split") == [(q, a, "test") for q, a, _ in TEST]
    _, rows = read(f"hf://{folder}", tmp_path)
    assert sorted(column(rows, "query", "split")) == sorted(
        [(q, "train") for q, *_ in TRAIN] + [(q, "test") for q, *_ in TEST]
    )
    with pytest.raises(NotFoundError, match="cannot be loaded"):
        read(f"hf://{folder}:nosuch", tmp_path)


@pytest.mark.parametrize("split", ["train[:2]", "train[1%:]", "train+test"])
def test_a_part_of_a_split_is_refused_as_all_of_it_would_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str
) -> None:
    package = ModuleType("datasets")  # without load_dataset: nothing may be asked for
    package.__spec__ = ModuleSpec("datasets", None)
    monkeypatch.setitem(sys.modules, "datasets", package)
    with pytest.raises(ConfigError, match="a split is named whole, such as :train; parts of one are not read"):
        read(f"hf://gsm8k:{split}", tmp_path)


def saved(folder: Path, schema: pa.Schema, row: dict[str, str]) -> None:
    """Write one split as `save_to_disk` does."""
    folder.mkdir(parents=True)
    (folder / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
    (folder / "dataset_info.json").write_text("{}")
    with ipc.new_stream(folder / "data.arrow", schema) as writer:
        writer.write_batch(pa.RecordBatch.from_pylist([row], schema))


def test_rows_of_a_saved_log_have_the_split_of_their_folder(tmp_path: Path) -> None:
    schema = pa.schema([("query", pa.string()), ("prompt", pa.string())])
    for split in ("test", "train"):
        saved(tmp_path / "both" / split, schema, {"query": f"{split} query", "prompt": "Say."})
    saved(tmp_path / "one", schema, {"query": "alone", "prompt": "Say."})
    (tmp_path / "both" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    _, rows = read(tmp_path / "both", tmp_path)
    assert column(rows, "query", "split") == [("test query", "test"), ("train query", "train")]
    _, rows = read(tmp_path / "one", tmp_path)
    assert column(rows, "query", "split") == [("alone", None)]
    _, rows = read(tmp_path / "both", tmp_path, constants={"split": "dev"})
    assert column(rows, "split") == ["dev", "dev"]


def test_a_field_that_is_mapped_to_the_split_is_the_split(tmp_path: Path) -> None:
    schema = pa.schema([(name, pa.string()) for name in ("query", "prompt", "part")])
    saved(tmp_path / "both" / "test", schema, {"query": "q", "prompt": "Say.", "part": "dev"})
    (tmp_path / "both" / "dataset_dict.json").write_text("{}")
    _, rows = read(tmp_path / "both", tmp_path, mapping={"split": "part"})
    assert column(rows, "split") == ["dev"]
