"""The folder of a run: whose it is, what a killed run finds in it, and what is left at the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest
from conftest import ROOT

from oirl.errors import ConfigError, WriteError
from oirl.tuning.run_folder import RunFolder

IDENTITY: dict[str, object] = {"method": "sft", "epochs": 2, "log": ("a", "b"), "versions": {"oirl": "1"}}


WEIGHTS = {"config.json", "weights"}


def saver(text: str) -> Callable[[Path], None]:
    """Return what saves weights, which are a text here."""

    def save(folder: Path) -> None:
        for name in WEIGHTS:
            (folder / name).write_text(text, encoding="utf-8")

    return save


def weights(folder: Path) -> str:
    return (folder / "weights").read_text(encoding="utf-8")


def fail(folder: Path) -> None:
    (folder / "half").touch()
    raise OSError("no room")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def told(run: RunFolder) -> list[tuple[str, int, int]]:
    return [(row["kind"], row["iteration"], row["step"]) for row in run.metrics()]


def opened(path: Path, identity: dict[str, object] = IDENTITY) -> RunFolder:
    """Return the folder of a run that has begun."""
    found = RunFolder(path, identity)
    with found.writing():
        pass
    return found


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return opened(tmp_path / "out")


# whose it is ------------------------------------------------------------------------------------------------


def test_a_new_folder_says_what_the_run_is(run: RunFolder) -> None:
    assert names(run.path) == {"run.json"}
    found = json.loads((run.path / "run.json").read_text(encoding="utf-8"))
    assert found["identity"] == {**IDENTITY, "log": ["a", "b"]}
    assert (run.iterations_done, run.updates_done, run.finished, run.best()) == (0, 0, False, None)


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    opened(tmp_path)
    assert names(tmp_path) == {"run.json"}


def test_the_same_run_may_go_on(run: RunFolder) -> None:
    before = (run.path / "run.json").read_bytes()
    run.finish_iteration(1, 10, saver("w"))
    assert RunFolder(run.path, IDENTITY).iterations_done == 1
    assert (run.path / "run.json").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"epochs": 3}, "epochs was 2, and is 3"),
        ({"log": ("a",)}, "log was"),
        ({"versions": {"oirl": "2"}}, "versions was"),
        ({"seed": 1}, "seed was None, and is 1"),
    ],
)
def test_the_folder_of_another_run_is_refused(run: RunFolder, change: dict[str, object], name: str) -> None:
    run.tell("update", 0, 1, {})
    with pytest.raises(ConfigError, match=name) as caught:
        RunFolder(run.path, {**IDENTITY, **change})
    assert str(run.path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_setting_that_is_gone_makes_another_run(run: RunFolder) -> None:
    run.tell("update", 0, 1, {})
    with pytest.raises(ConfigError, match="epochs was 2, and is None"):
        RunFolder(run.path, {k: v for k, v in IDENTITY.items() if k != "epochs"})


def test_a_start_that_came_to_nothing_keeps_no_other_run_out(run: RunFolder) -> None:
    run.go_on(0, 0)  # metrics without a line
    opened(run.path, {**IDENTITY, "epochs": 3})
    assert json.loads((run.path / "run.json").read_text(encoding="utf-8"))["identity"]["epochs"] == 3


@pytest.mark.parametrize("made", ["metrics.jsonl", "rollouts/iteration-000/part-000.parquet.journal"])
def test_a_start_that_came_to_something_does(made: str, run: RunFolder) -> None:
    (run.path / made).parent.mkdir(parents=True, exist_ok=True)
    (run.path / made).write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match="another run"):
        RunFolder(run.path, {**IDENTITY, "epochs": 3})


def test_of_two_at_once_the_second_is_refused(run: RunFolder) -> None:
    other = RunFolder(run.path, {**IDENTITY, "epochs": 3})
    with run.writing(), pytest.raises(ConfigError, match="another process") as raised, other.writing():
        pytest.fail("both write")
    assert "\n" not in str(raised.value)
    assert json.loads((run.path / "run.json").read_text(encoding="utf-8"))["identity"]["epochs"] == 2
    with other.writing():  # the first one is gone
        pass


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = RunFolder(tmp_path / "file" / "out", IDENTITY)
    with pytest.raises(WriteError, match="cannot make the folder"), found.writing():
        pytest.fail("written")


def test_death_gives_a_folder_free(run: RunFolder) -> None:
    script = "import sys, time, pathlib; from oirl.tuning.run_folder import RunFolder\n"
    script += "with RunFolder(pathlib.Path(sys.argv[1]), {}).writing(): print('in', flush=True); time.sleep(60)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, str(run.path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(ConfigError, match="another process"), run.writing():
            pytest.fail("both write")
        process.kill()
        process.wait()
    with run.writing():
        assert json.loads((run.path / "run.json").read_text(encoding="utf-8"))["identity"]["epochs"] == 2


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match="other files"):
        RunFolder(tmp_path, IDENTITY)
    assert names(tmp_path) == {"thesis.txt"}


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="is a file"):
        RunFolder(tmp_path / "out", IDENTITY)


@pytest.mark.parametrize("name", ["run.json", "state.json"])
def test_a_damaged_file_is_named(run: RunFolder, name: str) -> None:
    (run.path / name).write_text('{"iden', encoding="utf-8")
    with pytest.raises(ConfigError, match=f"{name} is damaged"):
        RunFolder(run.path, IDENTITY).weights  # noqa: B018


def test_a_process_that_does_not_write_leaves_no_trace(tmp_path: Path) -> None:
    silent = RunFolder(tmp_path / "out", IDENTITY, writes=False)
    silent.put("model", saver("w"))
    silent.finish_iteration(1, 10, saver("w"))
    silent.keep_best(0, 1, 0.5, saver("w"))
    silent.tell("update", 0, 1, {})
    silent.go_on(0, 0)
    silent.finish(saver("w"))
    assert not (tmp_path / "out").exists()


def test_a_process_that_does_not_write_reads_what_another_wrote(run: RunFolder) -> None:
    silent = RunFolder(run.path, IDENTITY, writes=False)
    run.finish_iteration(2, 25, saver("w"))
    run.keep_best(0, 1, 0.5, saver("best"))
    before = names(run.path)
    silent.finish(saver("x"))
    assert names(run.path) == before
    assert (silent.iterations_done, weights(silent.weights)) == (2, "w")
    assert silent.best() == run.best()


# iterations -------------------------------------------------------------------------------------------------


def test_a_finished_iteration_keeps_its_weights_only(run: RunFolder) -> None:
    run.finish_iteration(1, 10, saver("one"))
    (run.checkpoints(1) / "checkpoint-5").mkdir(parents=True)
    run.rollouts(1).mkdir(parents=True)
    run.finish_iteration(2, 25, saver("two"))
    assert names(run.path) == {"run.json", "state.json", "weights-2", "rollouts"}
    assert (run.iterations_done, run.updates_done, weights(run.weights)) == (2, 25, "two")
    assert run.rollouts(1).is_dir()


def test_each_iteration_has_folders_of_its_own(run: RunFolder) -> None:
    places = [place(i) for place in (run.rollouts, run.checkpoints) for i in range(12)]
    assert len(set(places)) == 24
    assert all(run.path in place.parents for place in places)


def test_weights_that_were_not_saved_whole_do_not_count(run: RunFolder) -> None:
    run.finish_iteration(1, 10, saver("one"))
    run.checkpoints(1).mkdir(parents=True)
    with pytest.raises(OSError, match="no room"):
        run.finish_iteration(2, 25, fail)
    again = RunFolder(run.path, IDENTITY)
    assert (again.iterations_done, again.updates_done, weights(again.weights)) == (1, 10, "one")
    assert again.checkpoints(1).is_dir()
    again.finish_iteration(2, 25, saver("two"))
    assert names(again.weights) == WEIGHTS  # nothing of what was half saved


def test_a_folder_takes_the_place_of_an_earlier_one_when_it_is_whole(run: RunFolder) -> None:
    run.put("model", saver("one"))
    with pytest.raises(OSError, match="no room"):
        run.put("model", fail)
    assert weights(run.path / "model") == "one"
    run.put("model", saver("two"))
    assert weights(run.path / "model") == "two"
    assert names(run.path) == {"run.json", "model"}


# the best ---------------------------------------------------------------------------------------------------


def test_the_best_is_kept(run: RunFolder) -> None:
    for iteration, step, value in [(0, 0, 0.5), (0, 9, 0.4), (0, 10, 0.6), (1, 5, 0.55)]:
        run.keep_best(iteration, step, value, saver(f"{iteration}-{step}"))
    best = run.best()
    assert best is not None
    assert (weights(best[0]), best[1]) == ("0-10", 0.6)
    assert [name for name in names(run.path) if name.startswith("best")] == [best[0].name]


def test_of_equals_the_first_is_kept(run: RunFolder) -> None:
    run.keep_best(0, 1, 0.5, saver("first"))
    run.keep_best(0, 2, 0.5, saver("second"))
    best = run.best()
    assert best is not None
    assert weights(best[0]) == "first"


def test_the_best_may_be_negative_and_later_in_steps_of_more_digits(run: RunFolder) -> None:
    for step, value in [(9, -3.0), (10, -2.5), (100, -0.125)]:
        run.keep_best(0, step, value, saver(str(step)))
    best = run.best()
    assert best is not None
    assert (weights(best[0]), best[1]) == ("100", -0.125)


def test_the_best_is_known_to_a_run_that_goes_on(run: RunFolder) -> None:
    run.keep_best(0, 7, 0.7, saver("seven"))
    again = RunFolder(run.path, IDENTITY)
    again.keep_best(0, 8, 0.65, saver("eight"))
    best = again.best()
    assert best is not None
    assert (weights(best[0]), best[1]) == ("seven", 0.7)


def test_a_best_that_could_not_be_saved_leaves_the_one_before(run: RunFolder) -> None:
    run.keep_best(0, 7, 0.7, saver("seven"))
    with pytest.raises(OSError, match="no room"):
        run.keep_best(0, 8, 0.8, fail)
    best = RunFolder(run.path, IDENTITY).best()
    assert best is not None
    assert (weights(best[0]), best[1]) == ("seven", 0.7)


def test_of_two_that_a_killed_run_left_the_later_is_the_best(run: RunFolder, tmp_path: Path) -> None:
    run.keep_best(0, 9, 0.5, saver("nine"))
    before = run.best()
    assert before is not None
    copytree(before[0], tmp_path / "aside")
    run.keep_best(0, 10, 0.6, saver("ten"))
    copytree(tmp_path / "aside", before[0])  # killed before it was removed
    best = RunFolder(run.path, IDENTITY).best()
    assert best is not None
    assert (weights(best[0]), best[1]) == ("ten", 0.6)


# the end ----------------------------------------------------------------------------------------------------


def test_a_finished_run_leaves_its_result_and_what_tells_of_it(run: RunFolder) -> None:
    run.go_on(0, 0)
    run.tell("update", 0, 1, {"loss": 2.0})
    run.keep_best(0, 1, 0.5, saver("best"))
    run.finish_iteration(1, 10, saver("last"))
    (run.checkpoints(1) / "checkpoint-5").mkdir(parents=True)
    run.finish(saver("result"))
    assert names(run.path) == {"run.json", "state.json", "metrics.jsonl", "model"}
    assert run.finished
    assert names(run.path / "model") == WEIGHTS
    assert weights(run.path / "model") == "result"


def test_a_result_that_is_there_stays(run: RunFolder) -> None:
    run.finish(saver("result"))
    again = RunFolder(run.path, IDENTITY)
    again.keep_best(0, 1, 0.5, saver("left over"))
    again.finish(saver("other"))
    assert weights(again.path / "model") == "result"
    assert names(again.path) == {"run.json", "model"}


def test_a_result_that_could_not_be_saved_is_none_and_may_be_tried_again(run: RunFolder) -> None:
    run.keep_best(0, 1, 0.5, saver("best"))
    with pytest.raises(OSError, match="no room"):
        run.finish(fail)
    assert not run.finished
    best = run.best()
    assert best is not None
    assert weights(best[0]) == "best"
    run.finish(saver("result"))
    assert names(run.path / "model") == WEIGHTS


# metrics ----------------------------------------------------------------------------------------------------


def test_metrics_are_told_in_order_with_their_values(run: RunFolder) -> None:
    run.tell("rollouts", 0, 0, {"responses": 8, "success": None})
    run.tell("update", 0, 10, {"loss": 1.5})
    assert run.metrics() == [
        {"kind": "rollouts", "iteration": 0, "step": 0, "responses": 8, "success": None},
        {"kind": "update", "iteration": 0, "step": 10, "loss": 1.5},
    ]


def test_a_line_of_metrics_is_told_once(run: RunFolder) -> None:
    for kind, iteration, step in [("update", 0, 1), ("update", 0, 1), ("validation", 0, 1), ("update", 1, 1)]:
        run.tell(kind, iteration, step, {})
    run.tell("update", 0, 2, {})
    assert told(run) == [("update", 0, 1), ("validation", 0, 1), ("update", 1, 1), ("update", 0, 2)]


ALL = [
    ("validation", 0, 0),
    ("rollouts", 0, 0),
    ("update", 0, 10),
    ("update", 0, 20),
    ("rollouts", 1, 0),
    ("update", 1, 10),
    ("validation", 1, 10),
    ("update", 1, 20),
    ("validation", 1, 20),
]


@pytest.mark.parametrize(
    ("iteration", "step", "kept"), [(0, 0, 2), (0, 10, 3), (0, 15, 3), (1, 0, 5), (1, 10, 7), (1, 20, 9), (2, 0, 9)]
)
def test_what_came_after_the_checkpoint_is_forgotten_and_told_again(
    run: RunFolder, iteration: int, step: int, kept: int
) -> None:
    for row in ALL:
        run.tell(*row, {"life": 1})
    again = RunFolder(run.path, IDENTITY)
    again.go_on(iteration, step)
    assert told(again) == ALL[:kept]
    for row in ALL:  # the run is repeated; what is known already is not told twice
        again.tell(*row, {"life": 2})
    assert told(again) == ALL
    assert [row["life"] for row in again.metrics()] == [1] * kept + [2] * (len(ALL) - kept)


def test_a_line_that_was_half_written_is_dropped(run: RunFolder) -> None:
    run.tell("update", 0, 1, {"loss": 1.0})
    with (run.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"kind": "update", "iteration": 0, "st')
    again = RunFolder(run.path, IDENTITY)
    again.go_on(0, 5)
    again.tell("update", 0, 2, {"loss": 0.5})
    assert told(again) == [("update", 0, 1), ("update", 0, 2)]


def test_a_last_line_that_lacks_its_end_alone_is_kept(run: RunFolder) -> None:
    run.tell("update", 0, 1, {"loss": 1.0})
    path = run.path / "metrics.jsonl"
    path.write_text(path.read_text(encoding="utf-8").rstrip("\n"), encoding="utf-8")
    again = RunFolder(run.path, IDENTITY)
    again.go_on(0, 5)
    again.tell("update", 0, 2, {"loss": 0.5})
    assert told(again) == [("update", 0, 1), ("update", 0, 2)]


def test_a_run_that_begins_has_no_metrics(run: RunFolder) -> None:
    run.go_on(0, 0)
    assert run.metrics() == []


def test_a_validation_that_is_no_number_is_never_the_best(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run", {"a": 1})
    run.keep_best(0, 1, float("nan"), lambda folder: (folder / "w").write_text("nan"))
    assert run.best() is None
    run.keep_best(0, 2, 0.5, lambda folder: (folder / "w").write_text("good"))
    run.keep_best(0, 3, float("nan"), lambda folder: (folder / "w").write_text("nan"))
    best = run.best()
    assert best is not None
    assert (best[0] / "w").read_text() == "good"


def test_weights_that_nobody_has_told_of_are_written_again(tmp_path: Path) -> None:
    run = opened(tmp_path / "run", {"a": 1})
    run.put("weights-1", lambda folder: (folder / "adapter_config.json").write_text("old"))
    RunFolder(tmp_path / "run", {"a": 1}).finish_iteration(
        1, 4, lambda folder: (folder / "adapter_config.json").write_text("new")
    )
    assert (tmp_path / "run" / "weights-1" / "adapter_config.json").read_text() == "new"


@pytest.mark.parametrize("text", ["[1]", '{"foo": 1}', '{"identity": 3}'])
def test_a_run_json_of_something_else_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(text)
    with pytest.raises(ConfigError, match="another folder"):
        RunFolder(tmp_path / "run", {"a": 1})
