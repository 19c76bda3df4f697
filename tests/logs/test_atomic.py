"""Files and folders that appear whole or not at all, also when the process is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

import oirl
from oirl.errors import ConfigError, OirlError, WriteError
from oirl.logs import atomic
from oirl.logs.atomic import atomic_file, atomic_folder
from oirl.rewards.saving import save_folder

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals, permissions and limits")


def visible(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))


def test_file_appears_only_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "log.txt"
    with atomic_file(target) as temporary:
        temporary.write_text("new")
        assert temporary.parent == target.parent
        assert visible(target.parent) == []
    assert target.read_text() == "new"
    assert [p.name for p in target.parent.iterdir()] == ["log.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_file_is_as_before_when_the_block_raises(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "log.txt"
    target.write_text("old")
    with pytest.raises(error), atomic_file(target) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise error
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["log.txt"]


@posix
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_file_is_readable_as_the_umask_says(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        with atomic_file(tmp_path / "a") as temporary:
            temporary.write_text("x")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == mode


def test_file_refuses_a_folder_and_a_file_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    with pytest.raises(ConfigError, match="is a folder"), atomic_file(tmp_path):
        pass
    with pytest.raises(WriteError, match="cannot make the folder"), atomic_file(tmp_path / "a" / "b"):
        pass
    assert visible(tmp_path) == ["a"]


@posix
def test_a_name_that_the_disk_refuses_is_an_error_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(OirlError, match="long"), atomic_file(tmp_path / ("b" * 250 + ".parquet")):
        pass


@posix
def test_a_full_disk_is_an_error_of_the_user_and_keeps_the_old_log(tmp_path: Path) -> None:
    source, out = tmp_path / "big.jsonl", tmp_path / "log.parquet"
    rows = ({"query": f"q{i}", "prompt": "p", "response": os.urandom(300).hex()} for i in range(5000))
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out.write_bytes(b"old")
    code = (
        "import resource, sys, oirl\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, 1 << 19))\n"
        "try: oirl.import_log(sys.argv[1], sys.argv[2])\n"
        "except Exception as e: print(isinstance(e, oirl.OirlError), e)\n"
    )
    done = run_code(code, source, out)
    assert out.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    assert done.stdout.startswith("True "), done.stdout + done.stderr


def test_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with atomic_folder(target, marker="manifest.json") as temporary:
        (temporary / "manifest.json").write_text("{}")
        (temporary / "sub").mkdir()
        (temporary / "sub" / "w").write_text("1")
        assert visible(tmp_path) == []
    assert sorted(p.name for p in target.rglob("*")) == ["manifest.json", "sub", "w"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_folder_replaces_its_own_kind_only(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    with atomic_folder(target, marker="m") as temporary:  # an empty folder may be taken
        (temporary / "m").write_text("1")
    with atomic_folder(target, marker="m") as temporary:
        (temporary / "m").write_text("2")
        (temporary / "new").write_text("")
    assert (target / "m").read_text() == "2"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    (target / "m").unlink()
    with pytest.raises(ConfigError, match="holds other files"), atomic_folder(target, marker="m"):
        pass
    assert (target / "new").is_file()
    with pytest.raises(ConfigError, match="is a file"), atomic_folder(target / "new", marker="m"):
        pass


@pytest.mark.parametrize(
    ("name", "refused"),
    [("a.npz", False), ("notes.txt", True), ("a.npz.bak", True), ("sub/a.npz", True)],
)
def test_folder_with_anything_that_is_not_ours_is_not_replaced(tmp_path: Path, name: str, refused: bool) -> None:
    target = tmp_path / "model"
    (target / name).parent.mkdir(parents=True)
    for file in ("m", name):
        (target / file).write_text("old")
    expected = pytest.raises(ConfigError, match=f"also holds '{name.split('/')[0]}'") if refused else nullcontext()
    with expected, atomic_folder(target, marker="m", others=("*.npz",)) as temporary:
        (temporary / "m").write_text("new")
    assert (target / "m").read_text() == ("old" if refused else "new")
    assert (target / name).exists() == refused
    assert visible(tmp_path) == ["model"]


def test_a_model_takes_no_folder_that_holds_a_file_of_the_user(tmp_path: Path) -> None:
    manifest = {"kind": "selector", "prompts": [], "model": {}, "embedder": {}, "data": {}, "metrics": {}}
    manifest["calibration"] = {}
    save_folder(tmp_path / "model", manifest, {"w": np.zeros(2)})
    save_folder(tmp_path / "model", manifest, {"w": np.ones(3)})  # an earlier model is replaced
    (tmp_path / "model" / "notes.md").write_text("mine")
    before = {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()}
    with pytest.raises(ConfigError, match=r"also holds 'notes\.md', which was not written here and would be lost"):
        save_folder(tmp_path / "model", manifest, {"w": np.zeros(2)})
    assert {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_folder_is_as_before_when_the_block_raises(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "m").write_text("old")
    with pytest.raises(RuntimeError), atomic_folder(target, marker="m") as temporary:  # noqa: PT012
        (temporary / "m").write_text("half")
        raise RuntimeError
    assert (target / "m").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_folder_is_put_back_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "m").write_text("old")
    replace = os.replace

    def failing(source: Path, to: Path) -> None:
        if Path(to) == target and "tmp" in Path(source).name:
            raise OSError("no")
        replace(source, to)

    monkeypatch.setattr(atomic.os, "replace", failing)
    with pytest.raises((OSError, OirlError)), atomic_folder(target, marker="m") as temporary:
        (temporary / "m").write_text("new")
    assert (target / "m").read_text() == "old"


KILLERS = {
    "while rows are written": "progress = lambda text: kill()",
    "before the data is on the disk": "os.fsync = lambda handle: kill()",
    "before the rename": "os.replace = lambda *paths: kill()",
}


def run_code(code: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=120,
        check=False,
    )


@posix
@pytest.mark.parametrize("moment", list(KILLERS))
@pytest.mark.parametrize("old", [True, False], ids=["over an old log", "new log"])
def test_import_killed_with_sigkill(tmp_path: Path, moment: str, old: bool) -> None:
    source, out = tmp_path / "rows.jsonl", tmp_path / "log.parquet"
    source.write_text("".join(json.dumps({"query": f"q {i}", "prompt": "p"}) + "\n" for i in range(2000)))
    if old:
        oirl.import_log(source, out, constants={"model": "old"})
    before = out.read_bytes() if old else None
    code = (
        "import os, signal, sys, oirl\n"
        "kill = lambda: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"progress = None\n{KILLERS[moment]}\n"
        "oirl.import_log(sys.argv[1], sys.argv[2], constants={'model': 'new'}, progress=progress)\n"
    )
    assert run_code(code, source, out).returncode == -signal.SIGKILL
    assert (out.read_bytes() if old else out.exists()) == (before if old else False)
    assert visible(tmp_path) == (["log.parquet", "rows.jsonl"] if old else ["rows.jsonl"])
    # What the killed process left is in nobody's way: the folder reads as before, the next import works.
    report = oirl.import_log(source, out)
    assert report.rows_kept == 2000
    assert oirl.read_log(tmp_path).num_rows == 2000
