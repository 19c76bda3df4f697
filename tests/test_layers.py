"""The house: who may import whom, what start-up loads, and what may never stand in the code."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

# Layer -> the layers that it may import, beside itself. Everybody may import the leaves.
LEAVES = {"errors", "records", "registry", "language_models", "__init__"}
ALLOWED = {
    "errors": set(),
    "registry": set(),
    "records": set(),
    "environment": set(),
    "language_models": set(),
    "__init__": set(),
    "statistics": set(),
    "logs": set(),
    "engines": {"logs", "statistics"},
    "rewards": {"logs", "statistics"},
    "evaluation": {"logs", "rewards", "statistics"},
    "tuning": {"logs", "engines", "rewards", "statistics"},
    "selection": {"logs", "engines", "rewards", "evaluation", "statistics"},
}
PURE = [
    "oirl/statistics/metrics.py",
    "oirl/statistics/intervals.py",
    "oirl/evaluation/policies.py",
    "oirl/evaluation/estimators.py",
    "oirl/evaluation/ceilings.py",
    "oirl/evaluation/power.py",
    "oirl/evaluation/costs.py",
    "oirl/rewards/calibration.py",
    "oirl/rewards/features.py",
    "oirl/rewards/objectives.py",
    "oirl/rewards/logistic.py",
    "oirl/rewards/arithmetic.py",
    "oirl/rewards/response_checks.py",
    "oirl/evaluation/best_of_n.py",
    "oirl/logs/text.py",
    "oirl/logs/numbers.py",
    "oirl/logs/answers.py",
    "oirl/logs/groups.py",
    "oirl/engines/designs.py",
    "oirl/engines/draws.py",
    "oirl/selection/meta_prompt.py",
    "oirl/tuning/losses.py",
    "oirl/tuning/relabelling.py",
    "oirl/tuning/choosing.py",
    "oirl/tuning/advantages.py",
    "oirl/tuning/kl.py",
    "oirl/tuning/shaping.py",
    "oirl/tuning/policy_losses.py",
    "oirl/tuning/guards.py",
    "oirl/tuning/experience.py",
]
HEAVY = ["torch", "sklearn", "xgboost", "transformers", "sentence_transformers", "pandas", "scipy", "pyarrow"]
SOURCES = sorted([*ROOT.glob("oirl/**/*.py"), *ROOT.glob("cli/**/*.py"), *ROOT.glob("data/**/*.py")])


def imports_of(path: Path, *, run_time_only: bool = False) -> Iterator[str]:
    """Yield the full names of the modules that a file imports, those inside functions included."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            skipped.update(child for inner in node.body for child in ast.walk(inner))
    for node in ast.walk(tree):
        if run_time_only and node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; name the module in full"
            yield node.module or ""


def layer_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if ROOT / "oirl" in p.parents], ids=lambda p: str(p.relative_to(ROOT))
)
def test_imports_run_one_way(path: Path) -> None:
    relative = path.relative_to(ROOT / "oirl").with_suffix("")
    layer = relative.parts[0]
    assert layer in ALLOWED, f"{path}: a new room of the house; add it to the table and to docs/architecture.md"
    for module in imports_of(path, run_time_only=layer == "__init__"):
        assert module.split(".")[0] not in {"oirl_cli", "oirl_data"}, f"{path} imports {module}"
        if module.split(".")[0] == "oirl":
            target = layer_of(module)
            assert target == layer or target in LEAVES | ALLOWED[layer], f"{path}: {layer} may not import {module}"


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_know_no_model_file_or_clock(name: str) -> None:
    forbidden = {"os", "pathlib", "time", "datetime", "random", "io", "subprocess", "pyarrow", "json", "sqlite3"}
    found = {module.split(".")[0] for module in imports_of(ROOT / name)}
    assert not found & forbidden
    used = {
        n.func.id
        for n in ast.walk(ast.parse((ROOT / name).read_text()))
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
    }
    assert "open" not in used


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_can_load_code_from_data(path: Path) -> None:
    modules = {module.split(".")[0] for module in imports_of(path)}
    assert not modules & {"pickle", "cPickle", "joblib", "dill", "cloudpickle", "shelve", "marshal"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"eval", "exec"}, path
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert isinstance(node.value, ast.Constant), path
            assert node.value.value is False, path


def _loaded_by(code: str) -> list[str]:
    script = f"import sys; sys.path[:0] = {[str(ROOT / p) for p in ('', 'cli', 'data')]!r}\n{code}\n"
    script += f"print(','.join(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return [m for m in done.stdout.strip().splitlines()[-1].split(",") if m] if done.stdout.strip() else []


def test_importing_oirl_loads_nothing_heavy() -> None:
    assert _loaded_by("import oirl; oirl.__version__") == []


def test_help_loads_nothing_heavy() -> None:
    code = "import typer.testing, oirl_cli.main as m\n"
    code += "r = typer.testing.CliRunner().invoke(m.app, ['--help']); assert r.exit_code == 0, r.output"
    assert _loaded_by(code) == []


def test_selecting_with_the_default_model_loads_no_learner(tmp_path: Path) -> None:
    from conftest import make_log

    import oirl

    oirl.PromptSelector().fit(make_log(60)).save(tmp_path / "model")
    loaded = _loaded_by(f"import oirl; oirl.load({str(tmp_path / 'model')!r}).select(['a cat of kind alpha?'])")
    assert not set(loaded) & {"sklearn", "torch", "xgboost", "transformers", "sentence_transformers", "pandas"}


def test_public_names_are_there_and_unknown_ones_are_not() -> None:
    import oirl

    for name in oirl.__all__:
        assert getattr(oirl, name) is not None
    assert set(oirl.__all__) <= set(dir(oirl))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = oirl.nonsense
