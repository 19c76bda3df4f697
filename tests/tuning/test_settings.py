"""What a run is told: files, changes on the command line, and what is refused, in one line that names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from oirl.errors import ConfigError, NotFoundError, UnknownNameError
from oirl.tuning.configuring import METHODS, make_settings, merge, read_settings
from oirl.tuning.settings import Hir, Raft, Settings

LOG: dict[str, Any] = {"model": "m", "out": "o", "log": "l.parquet"}
QUERIES: dict[str, Any] = {"model": "m", "out": "o", "queries": "q.jsonl", "grade": "numeric"}


def refusal(method: str, entries: dict[str, Any]) -> str:
    """Return the message of the error that settings raise."""
    with pytest.raises(ConfigError) as caught:
        make_settings(method, entries, "run.yaml")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("run.yaml: ")
    return message


def raft(**entries: Any) -> Raft:
    made = make_settings("raft", entries)
    assert isinstance(made, Raft)
    return made


# one setting ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["sft", "filter", "raft", "hir"])
def test_a_model_a_folder_and_a_log_suffice(method: str) -> None:
    made = make_settings(method, LOG)
    assert type(made) is METHODS[method]
    assert (made.method, made.model, made.out, made.log) == (method, "m", "o", ("l.parquet",))


def test_an_unknown_method_is_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"'raf'.*'raft'.*sft, filter, raft, hir"):
        make_settings("raf", LOG)


def test_an_unknown_setting_is_refused_with_the_nearest() -> None:
    message = refusal("sft", {**LOG, "learning_rat": 1e-4})
    assert "'learning_rat'" in message
    assert "did you mean 'learning_rate'" in message
    assert "weight_decay" in message  # all that are known


def test_a_setting_of_another_method_is_told_as_such() -> None:
    assert "it is one of raft, hir, apa, ppo, awr;" in refusal("sft", {**LOG, "samples": 4})
    assert "it is one of hir;" in refusal("raft", {**LOG, "suboutputs": 4})


@pytest.mark.parametrize(("name", "about"), [("model", "language model"), ("out", "folder")])
def test_a_missing_setting_is_named_with_what_it_is(name: str, about: str) -> None:
    message = refusal("sft", {k: v for k, v in LOG.items() if k != name})
    assert f"`{name}`" in message
    assert about in message


@pytest.mark.parametrize(
    ("method", "name", "value", "allowed"),
    [
        ("sft", "held_out", 1, "less than 1"),
        ("sft", "held_out", -0.1, "greater than or equal to 0"),
        ("sft", "epochs", 0, "greater than or equal to 1"),
        ("sft", "epochs", 1.5, "integer"),
        ("sft", "epochs", "many", "integer"),
        ("sft", "batch", 0, "greater than or equal to 1"),
        ("sft", "learning_rate", 0, "greater than 0"),
        ("sft", "learning_rate", float("nan"), "finite"),
        ("sft", "learning_rate", float("inf"), "finite"),
        ("sft", "warmup", 1.1, "less than or equal to 1"),
        ("sft", "schedule", "square", "'linear', 'cosine' or 'constant'"),
        ("sft", "keep", "first", "'best' or 'last'"),
        ("sft", "bf16", "perhaps", "boolean"),
        ("sft", "seed", 2**31, "less than"),
        ("sft", "model", 7, "string"),
        ("sft", "prompt", None, "string"),
        ("raft", "select", "worst", "'best_per_query' or 'top_fraction'"),
        ("raft", "top_fraction", 0, "greater than 0"),
        ("raft", "top_fraction", 1.5, "less than or equal to 1"),
        ("raft", "temperature", 0, "greater than 0"),
        ("raft", "min_reward", float("nan"), "finite"),
        ("hir", "contrastive", "all", "'none', 'opposite' or 'batch'"),
        ("hir", "label_smoothing", 1, "less than 1"),
        ("hir", "entropy_coef", -1, "greater than or equal to 0"),
        ("hir", "relabel", "ranks", "dictionary"),
    ],
)
def test_a_value_that_is_not_allowed_is_named_with_what_is(method: str, name: str, value: Any, allowed: str) -> None:
    message = refusal(method, {**LOG, name: value})
    assert message.startswith(f"run.yaml: {name} = {value!r}: ")
    assert allowed in message


def test_an_entry_of_a_list_is_named_by_its_place() -> None:
    assert refusal("sft", {**LOG, "log": ["a", 7]}).startswith("run.yaml: log.1 = 7: ")


def test_one_log_and_several_are_both_lists() -> None:
    assert make_settings("sft", {**LOG, "log": ["a", "b"], "report_to": "wandb"}).log == ("a", "b")
    assert make_settings("sft", {**LOG, "report_to": "wandb"}).report_to == ("wandb",)


def test_settings_stay_as_they_are() -> None:
    made = make_settings("sft", LOG)
    with pytest.raises(ValueError, match="frozen"):
        made.epochs = 9


# several settings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "entries", "names"),
    [
        ("sft", {**LOG, "batch": 12, "micro_batch": 8}, ["batch = 12", "micro_batch = 8"]),
        ("sft", {**LOG, "batch": 4}, ["batch = 4", "micro_batch = 8"]),
        ("sft", {**LOG, "log_every": 7}, ["save_every = 100", "log_every = 7"]),
        ("sft", {**LOG, "queries": "q.jsonl"}, ["`log`", "`queries`"]),
        ("raft", {"model": "m", "out": "o"}, ["`log`", "`queries`"]),
        ("sft", QUERIES, ["sft", "`log`"]),
        ("filter", QUERIES, ["filter", "`log`"]),
        ("raft", {**LOG, "iterations": 2}, ["iterations = 2", "`queries`"]),
        ("hir", {**LOG, "iterations": 2}, ["iterations = 2", "`queries`"]),
        ("raft", {**QUERIES, "reward": "score"}, ["reward", '"score"']),
        ("raft", {**QUERIES, "grade": None}, ['reward = "verdict"', "`grade`"]),
        ("hir", {**QUERIES, "grade": None}, ['reward = "verdict"', "`grade`"]),
        ("raft", {**LOG, "kl_coef": 0.1}, ["kl_coef", "log"]),
        ("hir", {**LOG, "contrastive": "batch", "micro_batch": 1}, ['contrastive = "batch"', "micro_batch = 2"]),
        ("hir", {**LOG, "relabel": {"bins": 4}}, ["relabel", "`name`", "ranks"]),
        ("hir", {**LOG, "relabel": {"name": 4}}, ["relabel", "`name`"]),
    ],
)
def test_settings_that_do_not_fit_together_are_named(method: str, entries: dict[str, Any], names: list[str]) -> None:
    message = refusal(method, entries)
    assert [name for name in names if name not in message] == []


@pytest.mark.parametrize(
    ("method", "entries"),
    [
        ("sft", {**LOG, "batch": 16, "micro_batch": 16, "log_every": 50, "save_every": 50}),
        ("raft", {**QUERIES, "iterations": 3, "kl_coef": 0.1}),
        ("raft", {**LOG, "iterations": 1, "reward": "score"}),
        ("raft", {**QUERIES, "grade": None, "reward": "mine:reward"}),
        ("hir", {**QUERIES, "grade": None, "relabel": {"name": "length"}}),
        ("hir", {**QUERIES, "grade": None, "relabel": {"name": "format", "pattern": "x"}}),
        ("hir", {**LOG, "contrastive": "batch", "micro_batch": 2}),
        ("hir", {**LOG, "contrastive": "opposite", "micro_batch": 1}),
    ],
)
def test_settings_that_fit_together_pass(method: str, entries: dict[str, Any]) -> None:
    made = make_settings(method, entries)
    given = {name: value for name, value in entries.items() if name != "log"}
    assert {name: getattr(made, name) for name in given} == given


def test_the_least_reward_of_verdicts_is_that_of_right_ones() -> None:
    assert raft(**LOG).least_reward == 1
    assert raft(**LOG, min_reward=0.0).least_reward == 0
    assert raft(**LOG, reward="score").least_reward is None
    assert raft(**LOG, reward="score", min_reward=-2.5).least_reward == -2.5
    assert raft(**QUERIES, kl_coef=0.1).least_reward is None  # what the penalty leaves of a 1 is less
    assert raft(**QUERIES, kl_coef=0.1, min_reward=0.5).least_reward == 0.5


def test_raft_and_hir_sample_at_the_temperatures_of_their_papers() -> None:
    hir = make_settings("hir", LOG)
    assert isinstance(hir, Hir)
    assert (raft(**LOG).temperature, hir.temperature) == (0.85, 1.0)


# files ------------------------------------------------------------------------------------------------------


def read(folder: Path, text: str) -> dict[str, Any]:
    file = folder / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return read_settings(file)


def test_a_file_is_read_as_its_entries(tmp_path: Path) -> None:
    text = "model: m\nlog: [a, b]\nrelabel:\n  name: ranks\n  bins: 8\n# no entry\nbf16: null\n"
    expected = {"model": "m", "log": ["a", "b"], "relabel": {"name": "ranks", "bins": 8}, "bf16": None}
    assert read(tmp_path, text) == expected
    assert read(tmp_path, "") == {}


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("learning_rate: 2e-5", "learning_rate", 2e-5),  # a text to YAML 1.1
        ("learning_rate: 1E-4", "learning_rate", 1e-4),
        ("epochs: 3", "epochs", 3),
        ("held_out: 0", "held_out", 0.0),
        ("bf16: yes", "bf16", True),
        ("bf16: false", "bf16", False),
        ("max_length: null", "max_length", None),
        ("prompt: 'Q: {query}'", "prompt", "Q: {query}"),
        ("report_to: []", "report_to", ()),
        ("max_grad_norm: .inf", "max_grad_norm", float("inf")),
    ],
)
def test_scalars_of_yaml_become_what_a_setting_is(tmp_path: Path, text: str, name: str, value: Any) -> None:
    found = getattr(make_settings("sft", {**LOG, **read(tmp_path, text)}), name)
    assert found == value
    assert type(found) is type(value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"none\.yaml"):
        read_settings(tmp_path / "none.yaml")
    with pytest.raises(NotFoundError):
        read_settings(tmp_path)


@pytest.mark.parametrize("text", ["a: [1", "a: b: c", "\ta: 1", "a: !!python/name:os.system", "? [a]\n: b", "\0"])
def test_what_is_no_yaml_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.yaml.*no YAML") as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"model: \xff\xfe")
    with pytest.raises(ConfigError, match="no YAML"):
        read_settings(tmp_path / "run.yaml")


@pytest.mark.parametrize(("text", "kind"), [("- a\n- b", "list"), ("sft", "str"), ("7", "int")])
def test_a_file_without_entries_is_refused(tmp_path: Path, text: str, kind: str) -> None:
    with pytest.raises(ConfigError, match=rf"name: value.*{kind}"):
        read(tmp_path, text)


# changes ----------------------------------------------------------------------------------------------------


def test_changes_take_the_place_of_entries() -> None:
    base = {"model": "m", "epochs": 1}
    assert merge(base, {"epochs": 3, "seed": 1}) == {"model": "m", "epochs": 3, "seed": 1}
    assert base == {"model": "m", "epochs": 1}


def test_a_dot_changes_an_entry_within_an_entry() -> None:
    base = {"relabel": {"name": "ranks", "bins": 4}}
    assert merge(base, {"relabel.bins": 8}) == {"relabel": {"name": "ranks", "bins": 8}}
    assert merge(base, {"relabel": {"name": "length"}}) == {"relabel": {"name": "length"}}
    assert base == {"relabel": {"name": "ranks", "bins": 4}}
    assert merge({}, {"relabel.name": "ranks", "relabel.bins": 8}) == {"relabel": {"name": "ranks", "bins": 8}}
    assert merge({"a": None}, {"a.b.c": 1, "a.b.d": 2}) == {"a": {"b": {"c": 1, "d": 2}}}


@pytest.mark.parametrize("value", ["m", 7, ["x"]])
def test_a_dot_into_what_has_no_entries_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"model\.name.*'model' has no entries"):
        merge({"model": value}, {"model.name": "n"})


def test_each_setting_is_told_of_where_it_is_declared() -> None:
    """The command line shows these lines as help."""
    for kind in METHODS.values():
        told = "\n".join(cls.__doc__ or "" for cls in kind.__mro__ if issubclass(cls, Settings))
        assert [name for name in kind.model_fields if f" {name}: " not in told] == []


@pytest.mark.parametrize(
    ("name", "value"), [("epochs", True), ("learning_rate", True), ("lora_alpha", float("inf")), ("log", [""])]
)
def test_what_only_looks_like_a_value_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        make_settings("sft", {"model": "m", "out": "o", "log": "l"} | {name: value})


@pytest.mark.parametrize("text", ["a: 2024-99-99", "a: !!int x", f"a: {'9' * 5000}"])
def test_a_value_that_yaml_cannot_read_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        read_settings(tmp_path / "c.yaml")
