"""Saved models: what comes back, and folders that mean harm or are broken."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_log, make_queries, run_oirl

from oirl import PromptRewardModel, PromptSelector, load
from oirl.errors import ConfigError, ModelFileError, NotFoundError
from oirl.rewards import saving
from oirl.rewards.saving import read_arrays, read_manifest, save_folder

QUERIES = make_queries(5, seed=9)
Edit = Callable[[Path], Any]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    PromptSelector().fit(make_log(30)).save(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def write_manifest(folder: Path, manifest: Any) -> None:
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def sign(folder: Path) -> None:
    """Give the manifest the right checksums, as whoever means harm would."""
    manifest = manifest_of(folder)
    manifest["files"] = {
        p.name: sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.name != "manifest.json"
    }
    write_manifest(folder, manifest)


def setting(*path: Any, value: Any) -> Edit:
    def edit(folder: Path) -> None:
        manifest = manifest_of(folder)
        place = manifest
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        write_manifest(folder, manifest)

    return edit


def weights(change: Callable[[dict[str, Any]], Any]) -> Edit:
    def edit(folder: Path) -> None:
        with np.load(folder / "weights.npz") as file:
            arrays = dict(file)
        change(arrays)
        np.savez_compressed(folder / "weights.npz", **arrays)
        sign(folder)

    return edit


def with_file(content: Callable[[bytes], bytes]) -> Edit:
    def edit(folder: Path) -> None:
        file = folder / "weights.npz"
        file.write_bytes(content(file.read_bytes()))
        sign(folder)

    return edit


def test_round_trip(saved: Path) -> None:
    selector = PromptSelector().fit(make_log(30))
    restored = load(saved)
    assert restored.model_.predict_proba(QUERIES) == pytest.approx(selector.model_.predict_proba(QUERIES), abs=1e-9)
    manifest = manifest_of(saved)
    assert manifest["format_version"] == 1
    assert manifest["kind"] == "prompt-selector"
    assert [p["prompt_id"] for p in manifest["prompts"]] == ["a", "b", "c"]
    assert manifest["data"]["n_rows"] == 180
    assert manifest["deploy"]["policy"] in ("selector", "best_prompt")
    assert manifest["metrics"]["auc"] > 0.5
    json.dumps(manifest, allow_nan=False)


def test_a_folder_holds_plain_files_only_and_no_text_of_the_log(saved: Path) -> None:
    assert sorted(p.name for p in saved.iterdir()) == ["manifest.json", "weights.npz"]
    with np.load(saved / "weights.npz", allow_pickle=False) as arrays:
        assert all(arrays[name].dtype.kind in "fiu" for name in arrays.files)
    manifest = (saved / "manifest.json").read_text()
    assert not any(q in manifest for q in make_log(30)["query"].to_pylist())


def test_a_reward_model_alone_is_not_taken_for_a_selector(tmp_path: Path) -> None:
    PromptRewardModel().fit(make_log(12)).save(tmp_path / "m")
    assert isinstance(load(tmp_path / "m"), PromptRewardModel)
    with pytest.raises(ModelFileError, match="prompt-reward-model"):
        PromptSelector.load(tmp_path / "m")


def test_saving_replaces_a_model_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    PromptSelector().fit(make_log(12)).save(folder)
    assert load(folder).model_.train_.n_queries == 12
    other = tmp_path / "photos"
    other.mkdir()
    (other / "one.jpg").write_text("dear")
    with pytest.raises(ConfigError, match="holds other files"):
        PromptSelector().fit(make_log(12)).save(other)
    assert (other / "one.jpg").read_text() == "dear"


def test_saving_objects_is_refused_not_pickled(tmp_path: Path) -> None:
    manifest = {"kind": "x", "model": {}, "embedder": {}, "prompts": [], "data": {}, "metrics": {}, "calibration": {}}
    with pytest.raises(ValueError, match=r"[Oo]bject"):
        save_folder(tmp_path / "m", manifest, {"a": np.array([object()])})
    assert list(tmp_path.iterdir()) == []


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.file,))


def test_a_pickle_in_the_weights_does_not_run(folder: Path, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    pickle.loads(pickle.dumps(Payload(trap)))
    assert trap.exists()  # the payload works
    trap.unlink()

    objects = np.array([Payload(trap)], dtype=object)
    weights(lambda arrays: arrays.update({"scorer.stack": objects}))(folder)
    with pytest.raises(ModelFileError, match="plain arrays"):
        load(folder)
    (folder / "weights.npz").write_bytes(pickle.dumps(Payload(trap)))
    sign(folder)
    with pytest.raises(ModelFileError):
        load(folder)
    with zipfile.ZipFile(folder / "weights.npz", "w") as archive:
        archive.writestr("scorer.stack.npy", pickle.dumps(Payload(trap)))
    sign(folder)
    with pytest.raises(ModelFileError):
        load(folder)
    assert not trap.exists()


@pytest.mark.parametrize("where", [("embedder", "name"), ("model", "name"), ("kind",)])
def test_code_that_a_manifest_names_is_not_imported(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: tuple[str, ...]
) -> None:
    (tmp_path / "hostile_module.py").write_text(f"open({str(tmp_path / 'trap')!r}, 'w')\ndef f(x): return x\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("hostile_module:f", "os:system"):
        setting(*where, value=name)(folder)
        with pytest.raises(ModelFileError):
            load(folder)
    assert not (tmp_path / "trap").exists()
    assert "hostile_module" not in sys.modules


def changed_byte(folder: Path) -> None:
    content = bytearray((folder / "weights.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "weights.npz").write_bytes(content)


def symlink(folder: Path) -> None:
    (folder / "weights.npz").rename(folder.parent / "elsewhere.npz")
    (folder / "weights.npz").symlink_to(folder.parent / "elsewhere.npz")


def huge_header(folder: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (2**50,)})
    with zipfile.ZipFile(folder / "weights.npz", "w") as archive:
        archive.writestr("scorer.stack.npy", header.getvalue() + b"12345678")
    sign(folder)


def patched(offset_local: int, offset_central: int, value: int) -> Edit:
    """Return an edit that sets a byte in every local and central header of the archive."""

    def content(data: bytes) -> bytes:
        changed = bytearray(data)
        for mark, offset in ((b"PK\x03\x04", offset_local), (b"PK\x01\x02", offset_central)):
            at = -1
            while (at := data.find(mark, at + 1)) >= 0:
                changed[at + offset] = value
        return bytes(changed)

    return with_file(content)


BROKEN: dict[str, Edit] = {
    "changed byte": changed_byte,
    "extra file": lambda f: (f / "more.npz").write_bytes(b""),
    "extra folder": lambda f: (f / "more").mkdir(),
    "missing file": lambda f: (f / "weights.npz").unlink(),
    "symlink": symlink,
    "listed script": lambda f: ((f / "run.py").write_text("1"), sign(f)),
    "traversal": setting("files", value={"../x": "0"}),
    "absolute name": setting("files", value={"/etc/passwd": "0"}),
    "version": setting("format_version", value=2),
    "version is text": setting("format_version", value="1"),
    "unknown kind": setting("kind", value="prompt-thing"),
    "unknown field": setting("on_load", value="rm"),
    "missing field": lambda f: write_manifest(f, {k: v for k, v in manifest_of(f).items() if k != "model"}),
    "garbage manifest": lambda f: (f / "manifest.json").write_bytes(bytes(range(256)) * 9),
    "manifest is a list": lambda f: write_manifest(f, []),
    "deep manifest": lambda f: (f / "manifest.json").write_text("[" * 200_000),
    "unknown model": setting("model", "name", value="nope"),
    "unknown parameter": setting("model", "nope", value=1),
    "bad parameter": setting("model", "ease_strengths", value=[-1.0]),
    "no model name": setting("model", value={}),
    "bad embedder block": setting("embedder", "blocks", value=["nope"]),
    "embedder name is a number": setting("embedder", "name", value=5),
    "unknown policy": setting("deploy", "policy", value="always"),
    "no deployment": setting("deploy", value=None),
    "deployment of others": setting("deploy", "more", value=1),
    "margin is text": setting("deploy", "margin", value="0.01"),
    "margin is NaN": setting("deploy", "margin", value=float("nan")),
    "slope is text": setting("calibration", "slope", value="1"),
    "slope is NaN": setting("calibration", "slope", value=float("nan")),
    "best prompt unknown": setting("data", "best_prompt", value="zzz"),
    "no data": setting("data", value={}),
    "no prompts": setting("prompts", value=[]),
    "a prompt too many": lambda f: setting(
        "prompts", value=[*manifest_of(f)["prompts"], {"prompt_id": "z", "prompt": "z"}]
    )(f),
    "an array missing": weights(lambda a: a.pop("scorer.stack")),
    "an array of another shape": weights(lambda a: a.update({"scorer.ease": a["scorer.ease"][:1]})),
    "an array of text": weights(lambda a: a.update({"scorer.stack": np.array(["x"] * 5)})),
    "a short stack": weights(lambda a: a.update({"scorer.stack": a["scorer.stack"][:1]})),
    "vocabulary and weights differ": weights(lambda a: a.update({"embedder.words_idf": a["embedder.words_idf"][:1]})),
    "rates of other prompts": weights(lambda a: a.update({"train.rates": a["train.rates"][:1]})),
    "neighbours cut": weights(lambda a: a.update({"knn.indices": a["knn.indices"][:1]})),
    "neighbours out of bounds": weights(lambda a: a.update({"knn.indices": a["knn.indices"] + 10**6})),
    "truncated npz": with_file(lambda data: data[: len(data) // 2]),
    "not a zip": with_file(lambda data: b"not a zip"),
    "empty npz": with_file(lambda data: b""),
    "raw member": with_file(lambda data: zip_of({"scorer.stack": b"hello"})),
    "huge array in a small header": huge_header,
    "encrypted npz": patched(6, 8, 1),
    "unknown compression": patched(8, 10, 99),
}


def zip_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_folder_is_refused_in_one_line(folder: Path, how: str) -> None:
    BROKEN[how](folder)
    with pytest.raises((ModelFileError, NotFoundError)) as found:
        load(folder)
    assert "\n" not in str(found.value)
    assert len(str(found.value)) < 700


def test_corrupt_deflated_data_with_right_checksums_is_refused(folder: Path) -> None:
    rng = np.random.default_rng(0)
    original = (folder / "weights.npz").read_bytes()
    for _ in range(60):
        content = bytearray(original)
        start = int(rng.integers(0, len(content) - 30))
        content[start : start + 20] = rng.bytes(20)
        (folder / "weights.npz").write_bytes(content)
        sign(folder)
        try:
            load(folder)
        except ModelFileError:
            continue


def test_a_bomb_is_not_unpacked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "_MAX_ARRAYS", 10**6)
    zeros = io.BytesIO()
    np.save(zeros, np.zeros(200_000))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", zeros.getvalue())
    (folder / "weights.npz").write_bytes(buffer.getvalue())
    assert len(buffer.getvalue()) < 10_000
    sign(folder)
    monkeypatch.setattr(np, "load", lambda *a, **k: pytest.fail("unpacked"))
    with pytest.raises(ModelFileError, match="unpacks to more"):
        load(folder)


def test_a_huge_manifest_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "_MAX_MANIFEST", 1000)
    (folder / "manifest.json").write_text(" " * 2000)
    with pytest.raises(ModelFileError, match="larger than"):
        read_manifest(folder)


@pytest.mark.parametrize("what", ["nothing", "empty folder", "file"])
def test_what_is_no_model_is_not_found(tmp_path: Path, what: str) -> None:
    path = tmp_path / "m"
    if what == "empty folder":
        path.mkdir()
    if what == "file":
        path.write_text("x")
    with pytest.raises(NotFoundError, match="oirl fit"):
        load(path)


def test_arrays_come_back_as_they_went(tmp_path: Path) -> None:
    arrays = {
        "a": np.arange(6, dtype=np.uint64).reshape(2, 3),
        "b.c": np.array([0.1, np.pi], dtype=np.float32),
        "empty": np.zeros((0, 4)),
        "tree_ubj": np.frombuffer(b"\x00{binary}", dtype=np.uint8),
    }
    fields = {"kind": "x", "model": {}, "embedder": {}, "prompts": [], "data": {}, "metrics": {}, "calibration": {}}
    save_folder(tmp_path / "m", fields, arrays)
    assert (tmp_path / "m" / "tree.ubj").read_bytes() == b"\x00{binary}"
    back = read_arrays(tmp_path / "m", read_manifest(tmp_path / "m"))
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype
        assert np.array_equal(back[name], array)


@pytest.mark.parametrize("how", ["changed byte", "margin is text", "huge array in a small header"])
def test_the_command_line_says_it_in_one_line(folder: Path, how: str) -> None:
    BROKEN[how](folder)
    done = run_oirl("select", folder, "the cat")
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("oirl: ")


def test_a_sound_file_of_another_model_is_refused_by_its_checksum(folder: Path) -> None:
    with np.load(folder / "weights.npz") as file:
        arrays = {name: file[name] for name in file.files}
    arrays["scorer.stack"] = arrays["scorer.stack"] + 0.5
    np.savez_compressed(folder / "weights.npz", **arrays)
    with pytest.raises(ModelFileError, match="SHA-256"):
        load(folder)
