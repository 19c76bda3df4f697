"""APA, PPO and AWR side by side on the demo's small language model, at equal generated responses. Prints JSON.

Each seed has its own training problems, order, draws and test problems, whose wording with numbers masked stands in no
training problem. Every run draws the same number of responses (`--rollouts` an iteration) for the same number of
iterations, rewarded by the verdict; success is measured afterwards on the test problems, greedily and at temperature 1.
Figures are means over seeds with 95% intervals (Student's t over seeds); differences are paired by seed.

Parts (`--part`, default all):
- `methods`: the three methods at their defaults but for the learning rates, which were chosen on another seed
  (`--part pilot`); curves of reward and KL over generated tokens; and what of APA's claims holds.
- `sweep`: λ of APA, λ of AWR, β of PPO (fixed): reward and KL at the end.
- `offline`: APA against AWR (and filtered SFT) on a log of the initial model (2306.02231, appendix D.3).
- `guard`: a reward model of 80 verdicts instead of the verdict, λ = 0.03: reward and success over √KL.

Run: OMP_NUM_THREADS=1 python benchmarks/online_methods.py [--part NAME] [--seeds 5] [--plots FOLDER]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import common  # noqa: F401  (puts oirl on the path)
import numpy as np
from tuning_methods import make_queries, over_seeds, success

import oirl
from oirl_data import small_lm_path

RATES = {"apa": 1e-4, "ppo": 1e-4, "awr": 1e-4}
SWEEP: dict[str, dict[str, Any]] = {
    "apa 0.03": {"kl_coef": 0.03},
    "apa 0.1": {"kl_coef": 0.1},
    "apa 0.3": {"kl_coef": 0.3},
    "apa 1": {"kl_coef": 1.0},
    "apa 3": {"kl_coef": 3.0},
    "awr 0.1": {"kl_coef": 0.1},
    "awr 0.3": {"kl_coef": 0.3},
    "awr 1": {"kl_coef": 1.0},
    "ppo 0.01": {"kl_coef": 0.01, "kl_controller": "fixed"},
    "ppo 0.05": {"kl_coef": 0.05, "kl_controller": "fixed"},
    "ppo 0.2": {"kl_coef": 0.2, "kl_controller": "fixed"},
}
Job = tuple[str, str, dict[str, Any], int]


def write_rows(queries: Iterable[Any], path: Path) -> str:
    """Write queries to a file and return its name."""
    rows = [{"query_id": q.query_id, "query": q.query, "answer": q.answer} for q in queries]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def shared(args: argparse.Namespace, folder: Path, seed: int) -> dict[str, Any]:
    """Return the settings that all runs share."""
    return {
        "model": str(small_lm_path()), "out": str(folder / "run"), "grade": "numeric", "held_out": 0.0, "keep": "last",
        "max_tokens": 64, "iterations": args.iterations, "rollouts": args.rollouts, "batch": 32, "micro_batch": 32,
        "save_every": 1000, "seed": seed,
    }  # fmt: skip


def one_run(job: Job, args: argparse.Namespace) -> dict[str, Any]:
    """Return the curves and the test success of one online run."""
    name, method, changes, seed = job
    train, test = make_queries(seed, args.problems, args.tests)
    with tempfile.TemporaryDirectory() as at:
        folder = Path(at)
        settings = shared(args, folder, seed) | {"learning_rate": RATES[method]} | changes
        settings |= {"queries": write_rows(train, folder / "queries.jsonl")}
        try:
            report = oirl.tune(method, settings)
        except oirl.OirlError as e:  # a method that breaks down is a result too
            print(f"seed {seed}, {name}: {e}", file=sys.stderr)
            return {"name": name, "seed": seed, "broke": str(e)}
        curve = {
            key: [row[key] for row in report.iterations]
            for key in ("reward", "success", "kl", "kl_k3", "entropy", "distinct_2", "tokens_mean")
        }
        tokens = np.cumsum([row["tokens"] for row in report.iterations]).tolist()
        found = {"name": name, "seed": seed, "tokens": tokens, **curve}
        found["test"], found["test_at_1"] = (success(report.model, "{query}", test, t) for t in (0.0, 1.0))
    print(f"seed {seed}, {name}: {found['test']:.3f}, KL {np.mean(curve['kl'][-5:]):.2f}", file=sys.stderr)
    return found


def initial(seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return the test success of the initial model."""
    test = make_queries(seed, args.problems, args.tests)[1]
    model = str(small_lm_path())
    return {
        "seed": seed,
        "test": success(model, "{query}", test, 0.0),
        "test_at_1": success(model, "{query}", test, 1.0),
    }


def offline(seed: int, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return what methods gain from a log of the initial model, without drawing anything."""
    train, test = make_queries(seed, args.problems, args.tests)
    with tempfile.TemporaryDirectory() as at:
        folder = Path(at)
        with oirl.open_engine("transformers", str(small_lm_path())) as engine:
            sampling = oirl.Sampling(max_tokens=64, seed=seed)
            log = folder / "log.parquet"
            oirl.collect(engine, train, [("plain", "{query}")], log, sampling=sampling, grade="numeric", replicates=8)
        general = shared(args, folder, seed) | {"log": str(log), "learning_rate": 3e-4}
        passes = {"rollouts": 64, "iterations": args.iterations}
        updates = args.iterations * 2 * 2  # as many as the online losses make of as many rollouts
        runs = {
            "apa": ("apa", passes),
            "awr": ("awr", passes),
            "awr 0.3": ("awr", passes | {"kl_coef": 0.3}),
            "filter": ("filter", {"updates": updates, "save_every": 1000}),
        }
        found = {"initial": {k: initial(seed, args)[k] for k in ("test", "test_at_1")}}
        for name, (method, changes) in runs.items():
            known = general if method != "filter" else {k: general[k] for k in FILTER}
            report = oirl.tune(method, known | changes | {"out": str(folder / name)})
            found[name] = {
                key: success(report.model, "{query}", test, t) for key, t in (("test", 0.0), ("test_at_1", 1.0))
            }
            print(f"seed {seed}, offline {name}: {found[name]}", file=sys.stderr)
    return found


FILTER = ("model", "grade", "held_out", "keep", "max_tokens", "batch", "micro_batch", "seed", "log", "learning_rate")


def guarded(seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return runs trained by a reward model of few verdicts: reward and success over KL, with the guard and without."""
    train, test = make_queries(seed, args.problems, args.tests)
    found: dict[str, Any] = {"seed": seed}
    with tempfile.TemporaryDirectory() as at:
        folder = Path(at)
        with oirl.open_engine("transformers", str(small_lm_path())) as engine:
            sampling = oirl.Sampling(max_tokens=64, seed=seed)
            log = folder / "log.parquet"
            oirl.collect(
                engine, train[:40], [("plain", "{query}")], log, sampling=sampling, grade="numeric", replicates=2
            )
        oirl.ResponseRewardModel(embedder="tfidf").fit(oirl.read_log(log)).save(folder / "reward")
        queries = write_rows(train, folder / "queries.jsonl")
        for name, changes in {
            "without": {"guard_gold": False, "keep": "last"},
            "best kept": {"guard_gold": False, "keep": "best"},
            "with": {"guard_gold": True, "keep": "best"},
        }.items():
            settings = shared(args, folder, seed) | {
                "queries": queries, "reward": str(folder / "reward"), "out": str(folder / name), "held_out": 0.25,
                "evaluate_every": 5, "learning_rate": RATES["apa"], "kl_coef": 0.03, **changes,
            }  # fmt: skip
            report = oirl.tune("apa", settings)
            rows = report.iterations
            found[name] = {key: [row[key] for row in rows] for key in ("reward", "success", "kl")}
            found[name] |= {"guards": report.guards, "kept": report.kept}
            found[name] |= {"test": success(report.model, "{query}", test, 0.0)}
            found[name] |= {"test_at_1": success(report.model, "{query}", test, 1.0)}
            print(f"seed {seed}, guard {name}: {found[name]['test_at_1']:.3f} {report.guards}", file=sys.stderr)
        found["initial"] = initial(seed, args)
    return found


def band(runs: list[dict[str, Any]], key: str) -> list[list[float]]:
    """Return mean, low and high over seeds of each iteration."""
    table = np.array([run[key] for run in runs])
    return [[over_seeds(list(column))[k] for k in ("mean", "ci_low", "ci_high")] for column in table.T]


def summarise(runs: list[dict[str, Any]], first: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of one setting over its seeds."""
    whole = [run for run in runs if "broke" not in run]
    found: dict[str, Any] = {"seeds": len(runs), "broke": len(runs) - len(whole)}
    if len(whole) < 2:
        return found
    start = {row["seed"]: row for row in first}
    for key in ("test", "test_at_1"):
        found[key] = over_seeds([run[key] for run in whole])
        found[f"{key}_gain"] = over_seeds([run[key] - start[run["seed"]][key] for run in whole])
    third = max(len(whole[0]["reward"]) // 3, 1)
    found["reward_first_third"] = over_seeds([float(np.mean(run["reward"][:third])) for run in whole])
    found["reward_last_third"] = over_seeds([float(np.mean(run["reward"][-third:])) for run in whole])
    found["kl_last_third"] = over_seeds([float(np.mean(run["kl"][-third:])) for run in whole])
    # How steady: the deviation of KL between seeds over its mean; within a run the noise of its estimate is in the way.
    last = [float(np.mean(run["kl_k3"][-third:])) for run in whole]
    found["kl_k3_last_third_deviation"] = round(float(np.std(last, ddof=1) / np.mean(last)), 3)
    found["entropy_last"] = over_seeds([run["entropy"][-1] for run in whole])
    found["tokens"] = over_seeds([float(run["tokens"][-1]) for run in whole])
    return found


def difference(a: list[dict[str, Any]], b: list[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> Any:
    """Return the paired difference of a figure of two settings over seeds."""
    other = {run["seed"]: run for run in b if "broke" not in run}
    pairs = [(run, other[run["seed"]]) for run in a if "broke" not in run and run["seed"] in other]
    return over_seeds([value(x) - value(y) for x, y in pairs]) if len(pairs) > 1 else None


def draw(curves: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    """Draw reward and KL over generated tokens, with bands over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True)
    for name, runs in curves.items():
        runs = [run for run in runs if "broke" not in run]
        tokens = np.mean([run["tokens"] for run in runs], axis=0) / 1000
        for axis, key in zip(axes, ("reward", "kl"), strict=True):
            mean, low, high = np.array(band(runs, key)).T
            axis.plot(tokens, mean, label=name.upper())
            axis.fill_between(tokens, low, high, alpha=0.2)
    for axis, text in zip(axes, ("success of sampled responses", "KL of a response, nats"), strict=True):
        axis.set(xlabel="generated tokens, thousands", title=text)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "online_methods.svg", metadata={"Date": None})
    plt.close(figure)


def draw_guard(runs: list[dict[str, Any]], folder: Path) -> None:
    """Draw reward and success over √KL without the guard, and where the guard stopped."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True)
    for i, run in enumerate(runs):
        stopped = any(guard["action"] == "stop" for guard in run["with"]["guards"])
        distance = np.sqrt(np.maximum(run["without"]["kl"], 0))
        for axis, key in zip(axes, ("reward", "success"), strict=True):
            axis.plot(distance, run["without"][key], color="C0", alpha=0.5, label="without guard" if not i else None)
            if not stopped:
                continue
            stop = len(run["with"]["kl"]) - 1
            axis.plot(
                distance[stop], run["without"][key][stop], "o", color="C3", label="guard stops" if not i else None
            )
    for axis, text in zip(axes, ("reward model (log-odds)", "success"), strict=True):
        axis.set(xlabel="√KL", title=text)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "online_guard.svg", metadata={"Date": None})
    plt.close(figure)


def gather(jobs: list[Job], args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Run jobs, some at a time, and return name -> runs."""
    found: dict[str, list[dict[str, Any]]] = {}
    with ProcessPoolExecutor(args.processes, mp_context=get_context("spawn")) as pool:
        for run in pool.map(one_run, jobs, [args] * len(jobs)):
            found.setdefault(run["name"], []).append(run)
    return found


def each_seed(function: Callable[..., Any], args: argparse.Namespace) -> list[Any]:
    """Run a function of a seed for all seeds."""
    with ProcessPoolExecutor(args.processes, mp_context=get_context("spawn")) as pool:
        return list(pool.map(function, range(args.seeds), [args] * args.seeds))


def compare_methods(args: argparse.Namespace) -> dict[str, Any]:
    """Part `methods`."""
    first = each_seed(initial, args)
    curves = gather([(m, m, {}, seed) for seed in range(args.seeds) for m in RATES], args)
    if args.plots:
        draw(curves, args.plots)
    found: dict[str, Any] = {name: summarise(runs, first) for name, runs in curves.items()}
    found["initial"] = {key: over_seeds([row[key] for row in first]) for key in ("test", "test_at_1")}
    for other in ("ppo", "awr"):
        found[f"apa - {other}"] = {
            "mean reward of all iterations": difference(
                curves["apa"], curves[other], lambda run: float(np.mean(run["reward"]))
            ),
            "test": difference(curves["apa"], curves[other], lambda run: run["test"]),
            "test_at_1": difference(curves["apa"], curves[other], lambda run: run["test_at_1"]),
        }
    return found


def main() -> None:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["pilot", "methods", "sweep", "offline", "guard"], action="append")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--rollouts", type=int, default=64)
    parser.add_argument("--problems", type=int, default=400)
    parser.add_argument("--tests", type=int, default=500)
    parser.add_argument("--processes", type=int, default=2, help="runs at a time")
    parser.add_argument("--plots", type=Path, help="folder for the figures")
    args = parser.parse_args()
    found: dict[str, Any] = {"settings": {k: v for k, v in vars(args).items() if k not in ("plots", "part")}}
    for part in args.part or ["methods", "sweep", "offline", "guard"]:
        if part == "pilot":
            grid = [(f"{m} {lr:g}", m, {"learning_rate": lr}, 1000) for m in RATES for lr in (1e-4, 3e-4, 1e-3)]
            runs = gather(grid, args)
            keys = ("test", "test_at_1", "broke")
            found[part] = {name: {k: run[k] for k in keys if k in run} for name, (run,) in runs.items()}
        elif part == "methods":
            found[part] = compare_methods(args)
        elif part == "sweep":
            seeds = range(min(args.seeds, 3))
            first = [initial(seed, args) for seed in seeds]
            runs = gather([(n, n.split()[0], changes, seed) for n, changes in SWEEP.items() for seed in seeds], args)
            found[part] = {name: summarise(some, first) for name, some in runs.items()}
        elif part == "offline":
            seeds_found = each_seed(offline, args)
            found[part] = {
                name: {key: over_seeds([seed[name][key] for seed in seeds_found]) for key in ("test", "test_at_1")}
                | {"gain_at_1": over_seeds([s[name]["test_at_1"] - s["initial"]["test_at_1"] for s in seeds_found])}
                for name in seeds_found[0]
            }
            found["offline apa - awr"] = {
                key: over_seeds([s["apa"][key] - s["awr"][key] for s in seeds_found]) for key in ("test", "test_at_1")
            }
        else:
            runs_found = each_seed(guarded, args)
            if args.plots:
                draw_guard(runs_found, args.plots)
            found[part] = {
                name: {key: over_seeds([run[name][key] for run in runs_found]) for key in ("test", "test_at_1")}
                for name in ("initial", "without", "best kept", "with")
            }
            for other in ("without", "best kept", "initial"):
                found[part][f"with - {other}"] = {
                    key: over_seeds([run["with"][key] - run[other][key] for run in runs_found])
                    for key in ("test", "test_at_1")
                }
            found[part]["iterations with the guard"] = [len(run["with"]["kl"]) for run in runs_found]
            found[part]["curves without"] = [
                {key: [round(v, 3) for v in run["without"][key][::5]] for key in ("reward", "success", "kl")}
                for run in runs_found
            ]
            found[part]["guards"] = [run["with"]["guards"] for run in runs_found]
            found[part]["kept"] = [run["with"]["kept"] for run in runs_found]
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
