"""Language models with scalar heads: what they learn of a rule, how a stopped run goes on, the saved form."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import torch
from conftest import ROOT

from oirl import load
from oirl.errors import ConfigError, DataError, ModelFileError, NotFittedError, OirlError
from oirl.language_models import load_language_model, load_tokenizer, token_limit
from oirl.logs.pairs import EMPTY, SAME, save_pairs
from oirl.records import PREFERENCE_SCHEMA
from oirl.rewards.encoding import Encoded, by_length, encode, pad
from oirl.rewards.language_model import LanguageModelRewardModel, parameters_of
from oirl.rewards.scalar_head import ScalarHeads, Training
from oirl_data import small_lm_path

BASE = str(small_lm_path())
NAMES = (
    "Anna Ben Carla David Emma Felix Grace Hugo Ines Jonas Kira Leo Maria Noah Olga Paul Rosa Sam Tara Viktor".split()
)
THINGS = "apples bags balls books boxes cards coins cups flowers hats kites lamps marbles packs pencils plates".split()
VERBS = "buys finds gets sells gives brings makes needs".split()
FILES = ("manifest.json", "*.npz", "*.safetensors", "*.json", "*.txt", "*.jinja")
QUICK: dict[str, Any] = {"batch": 8, "learning_rate": 3e-3, "heads": 3}


def make_pairs(n: int = 100, seed: int = 0, good: str = "blue", bad: str = "red") -> pa.Table:
    """Return pairs of which the response that says `good` is preferred to the one that says `bad`."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        first, second, third = (NAMES[k] for k in rng.choice(len(NAMES), 3, replace=False))
        a, b, c = (THINGS[k] for k in rng.choice(len(THINGS), 3, replace=False))
        v, w = (VERBS[k] for k in rng.choice(len(VERBS), 2, replace=False))
        query = f"{first} {v} {a} and {second} {w} {b} from {third} . How many {c} are there ?"
        number = rng.integers(1, 60)
        texts = [f"There are {number} {colour} {c} ." for colour in (good, bad)]
        pair = {"pair_id": f"{seed}-{i}", "query": query, "chosen": texts[0], "rejected": texts[1]}
        rows.append(pair | {"margin": float(1 + i % 3)})
    return pa.Table.from_pylist(rows, PREFERENCE_SCHEMA)


PAIRS, NEW = make_pairs(), make_pairs(60, seed=1)


def model(**options: Any) -> LanguageModelRewardModel:
    return LanguageModelRewardModel(BASE, **{**QUICK, **options})


def differences(fitted: LanguageModelRewardModel, pairs: pa.Table = NEW) -> np.ndarray:
    queries, chosen, rejected = (pairs[name].to_pylist() for name in ("query", "chosen", "rejected"))
    return fitted.predict_reward(queries, chosen) - fitted.predict_reward(queries, rejected)


def weights(fitted: LanguageModelRewardModel) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in fitted._model.state_dict().items()}


def same(a: LanguageModelRewardModel, b: LanguageModelRewardModel, tolerance: float) -> bool:
    one, other = weights(a), weights(b)
    close = (torch.allclose(one[name], other[name], rtol=0, atol=tolerance) for name in one)
    return one.keys() == other.keys() and all(close)


@pytest.fixture(scope="module")
def fitted() -> LanguageModelRewardModel:
    return model().fit(PAIRS)


def test_a_rule_is_learned_and_holds_for_unseen_queries(fitted: LanguageModelRewardModel) -> None:
    assert (differences(fitted) > 0).mean() > 0.9
    turned = model().fit(make_pairs(good="red", bad="blue"))
    assert (differences(turned) > 0).mean() < 0.1


def test_a_rule_without_exception_and_one_of_chance() -> None:
    rng = np.random.default_rng(0)
    rows = make_pairs(150).to_pylist()
    for row in rows:
        if rng.random() < 0.5:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    drawn = model().fit(pa.Table.from_pylist(rows, PREFERENCE_SCHEMA))
    assert np.abs(differences(drawn)).mean() < 1.0
    assert drawn.metrics_["brier"] == pytest.approx(0.25, abs=0.08)


def test_training_starts_with_all_rewards_equal() -> None:
    """So small a step moves nothing: every reward is that of a head of zeros."""
    fresh = model(learning_rate=1e-30).fit(PAIRS)
    assert float(fresh._model.head.weight.abs().max()) < 1e-25
    assert np.abs(differences(fresh)).max() < 1e-12


def test_estimates_are_means_and_spreads_of_heads(fitted: LanguageModelRewardModel) -> None:
    queries, responses = NEW["query"].to_pylist(), NEW["chosen"].to_pylist()
    found = fitted.estimate(queries, responses)
    slope, intercept = fitted._scale
    heads = []
    for query, response in zip(queries, responses, strict=True):
        row = encode(fitted._tokenizer, query, response, 128)
        with torch.inference_mode():
            state = fitted._model.causal.base_model(torch.tensor([row.ids])).last_hidden_state[0, -1]
            heads.append((fitted._model.head.weight @ state).numpy() * slope + intercept)
    assert found.reward == pytest.approx(np.mean(heads, axis=1), abs=1e-4)
    assert found.spread == pytest.approx(np.std(heads, axis=1), abs=1e-4)
    assert found.spread.max() > 1e-3  # each head saw its own weights of the pairs


def test_rewards_do_not_depend_on_what_is_asked_beside(fitted: LanguageModelRewardModel) -> None:
    queries = [*NEW["query"].to_pylist()[:20], "How many ?"]
    responses = [*NEW["chosen"].to_pylist()[:20], "There are " + "red blue " * 30]
    alone = [fitted.predict_reward([q], [r])[0] for q, r in zip(queries, responses, strict=True)]
    assert fitted.predict_reward(queries, responses) == pytest.approx(alone, abs=1e-5)
    assert fitted.predict_reward([], []).shape == (0,)


def test_the_mean_reward_of_the_pairs_is_zero(fitted: LanguageModelRewardModel) -> None:
    queries = PAIRS["query"].to_pylist()
    both = [fitted.predict_reward(queries, PAIRS[side].to_pylist()) for side in ("chosen", "rejected")]
    assert np.mean(both) == pytest.approx(0, abs=1e-5)


def test_what_is_remembered_of_the_pairs(fitted: LanguageModelRewardModel) -> None:
    assert fitted.data_["n_pairs"] == 100
    assert fitted.data_["n_held_out"] == 10
    assert fitted.data_["n_queries"] == len(set(PAIRS["query"].to_pylist()))
    assert fitted.data_["longer_preferred"] == 1.0  # "blue" has a letter more than "red"
    assert fitted.seen_.overlap(PAIRS["query"].to_pylist())[0] == 100
    assert fitted.warnings_ == []


def test_pairs_that_say_nothing_are_left_out(fitted: LanguageModelRewardModel) -> None:
    rows = PAIRS.to_pylist()
    rows += [rows[0] | {"rejected": rows[0]["chosen"]}, rows[0] | {"chosen": " "}]
    again = model().fit(pa.Table.from_pylist(rows, PREFERENCE_SCHEMA))
    assert again.left_out_ == {SAME: 1, EMPTY: 1}
    assert same(again, fitted, 0)


def test_one_seed_one_model_and_another_another(fitted: LanguageModelRewardModel) -> None:
    assert same(model().fit(PAIRS), fitted, 0)
    assert not same(model(seed=1).fit(PAIRS), fitted, 1e-4)


@pytest.mark.parametrize("options", [{"micro_batch": 3}, {"micro_batch": 1}, {"gradient_checkpointing": True}], ids=str)
@pytest.mark.parametrize("imitation", [0.0, 0.1])
def test_what_saves_memory_changes_no_result(options: dict[str, Any], imitation: float) -> None:
    few = {"learning_rate": 1e-4, "imitation": imitation, "margin": "pairs"}
    pairs = PAIRS.slice(0, 40)
    assert same(model(**few, **options).fit(pairs), model(**few).fit(pairs), 2e-6)
    assert not same(model(**few).fit(pairs), model(**few | {"learning_rate": 2e-4}).fit(pairs), 2e-6)


def test_gradient_checkpointing_recomputes_activations() -> None:
    """Without this the test before would pass where nothing is recomputed."""
    calls: dict[bool, int] = {}
    for recompute in (False, True):
        kept = model(gradient_checkpointing=recompute)
        causal = load_language_model(BASE, dtype="float32")
        calls[recompute] = 0

        def count(*_: Any, key: bool = recompute) -> None:
            calls[key] += 1

        causal.base_model.layers[0].self_attn.register_forward_pre_hook(count)
        made = kept._make(causal).train()
        ids = torch.tensor([[1, 20, 30]])
        made.rewards(made.states(ids, torch.ones_like(ids)), torch.ones_like(ids)).sum().backward()
    assert calls == {False: 1, True: 2}


@pytest.mark.parametrize("margin", [None, [0.5, 1.0, 3.0]])
@pytest.mark.parametrize("imitation", [0.0, 0.2])
def test_the_loss_by_hand(margin: list[float] | None, imitation: float) -> None:
    made, tokenizer = ScalarHeads(load_language_model(BASE, dtype="float32"), 2).eval(), load_tokenizer(BASE)
    generator = torch.Generator().manual_seed(0)
    made.head.weight.data.normal_(generator=generator)
    sides = [[encode(tokenizer, r["query"], r[s], 128) for r in NEW.to_pylist()[:3]] for s in ("chosen", "rejected")]
    ids, mask, response = pad([*sides[0], *sides[1]], 0)
    weights_ = torch.rand((3, 2), generator=generator)
    how = Training(0.7, imitation, 0.3, 1, 8, 8, 1e-3, 100, 0)
    with torch.inference_mode():
        wide = None if margin is None else torch.tensor(margin)
        loss, _ = made(ids, mask, response, wide, weights_, how)
        rewards = np.array([[(made.head.weight @ state_of(made, row)).numpy() for row in side] for side in sides])
        written = [-sum(logprobs_of(made, row)[row.context - 1 :]) for row in sides[0]]
    ahead = rewards[0] - rewards[1] - (0.0 if margin is None else np.array(margin)[:, None])
    w = weights_.numpy()
    expected = 0.7 * ((w * np.log1p(np.exp(-ahead))).mean() + 0.3 * (w * (rewards[0] + rewards[1]) ** 2).mean())
    assert float(loss) == pytest.approx(expected + imitation * np.mean(written), rel=1e-4)


def state_of(made: ScalarHeads, row: Encoded) -> torch.Tensor:
    return made.causal.base_model(torch.tensor([row.ids])).last_hidden_state[0, -1]


def logprobs_of(made: Any, row: Encoded) -> list[float]:
    """Return log P of each token but the first, given those before it."""
    logprobs = torch.log_softmax(made.causal(torch.tensor([row.ids])).logits[0], dim=-1)
    return [float(logprobs[t - 1, row.ids[t]]) for t in range(1, len(row.ids))]


@pytest.mark.parametrize("margin", ["none", "pairs"])
def test_what_is_trained_on_is_nine_tenths_with_their_margins(margin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from oirl.rewards import scalar_head

    class Seen(Exception):
        pass

    def look(_: Any, pairs: Any, how: Training, *__: Any) -> None:
        raise Seen(pairs, how)

    monkeypatch.setattr(scalar_head, "train", look)
    with pytest.raises(Seen) as e:
        model(margin=margin).fit(PAIRS)
    data, how = e.value.args
    assert len(data.chosen) == len(data.rejected) == 90
    assert data.weights.shape == (90, 3)
    assert data.weights.mean() == pytest.approx(1, abs=0.2)
    assert (how.batch, how.micro_batch, how.ranking) == (8, 8, 1.0)
    if margin == "none":
        assert data.margin is None
        return
    tokenizer = load_tokenizer(BASE)
    of_tokens = {
        tuple(encode(tokenizer, r["query"], r["chosen"], 128).ids): r["margin"] / np.mean(PAIRS["margin"].to_pylist())
        for r in PAIRS.to_pylist()
    }
    assert data.margin == pytest.approx([of_tokens[tuple(row.ids)] for row in data.chosen])


def chosen_loss(fitted: LanguageModelRewardModel) -> float:
    """Return −log P of the tokens of unseen chosen responses, by hand."""
    rows = [encode(fitted._tokenizer, r["query"], r["chosen"], 128) for r in NEW.to_pylist()]
    with torch.inference_mode():
        return float(np.mean([-sum(logprobs_of(fitted._model, row)[row.context - 1 :]) for row in rows]))


def test_imitation_learns_to_write_the_chosen_responses(fitted: LanguageModelRewardModel) -> None:
    both = model(imitation=0.2).fit(PAIRS)
    assert chosen_loss(both) < chosen_loss(fitted) - 3
    assert (differences(both) > 0).mean() > 0.9


def test_ranking_alone_leaves_the_output_layer_as_it_was(fitted: LanguageModelRewardModel) -> None:
    before = load_language_model(BASE, dtype="float32").get_output_embeddings().weight
    assert torch.equal(fitted._model.causal.get_output_embeddings().weight, before)
    both = model(imitation=0.2).fit(PAIRS.slice(0, 40))
    assert not torch.equal(both._model.causal.get_output_embeddings().weight, before)


def test_the_length_limit_holds(fitted: LanguageModelRewardModel) -> None:
    """What of a query lies before the last tokens is not read."""
    short = model(max_length=12).fit(PAIRS.slice(0, 40))
    queries = ["Anna buys books . How many are there ?", "Ben sells hats . How many are there ?"]
    responses = ["There are 5 blue apples ."] * 2  # with its end seven tokens: five of the query are read
    rewards = short.predict_reward(queries, responses)
    assert rewards[0] == rewards[1]
    unlike = fitted.predict_reward(queries, responses)
    assert unlike[0] != unlike[1]


# Encoding ------------------------------------------------------------------------------------------------


def test_query_and_response_are_one_text_with_its_end() -> None:
    tokenizer = load_tokenizer(BASE)
    row = encode(tokenizer, "How many ?", "There are 5 .", 100)
    assert tokenizer.convert_ids_to_tokens(row.ids) == "<s> How many ? There are 5 . </s>".split()
    assert row.context == 4


@pytest.mark.parametrize("limit", range(1, 10))
def test_what_is_too_long_loses_the_beginning_of_the_query_first(limit: int) -> None:
    tokenizer = load_tokenizer(BASE)
    whole = encode(tokenizer, "How many ?", "There are 5 .", 100)
    said = whole.ids[whole.context :]
    cut = encode(tokenizer, "How many ?", "There are 5 .", limit)
    assert len(cut.ids) == limit
    assert cut.ids == (whole.ids[-limit:] if limit >= len(said) else said[:limit])
    assert cut.ids[cut.context :] == said[:limit]


def test_a_chat_template_is_used() -> None:
    tokenizer = load_tokenizer(BASE)
    each = "{% for m in messages %}{{ m.role }} A {{ m.content }}{% endfor %}"
    tokenizer.chat_template = each + "{% if add_generation_prompt %} Answer{% endif %}"
    row = encode(tokenizer, "How many ?", "5", 100)
    tokens = tokenizer.convert_ids_to_tokens(row.ids)
    assert tokens[-7:] == ["A", "How", "many", "?", "Answer", "5", "</s>"]
    assert tokens.count("</s>") == 1
    assert len(row.ids) - row.context == 2


def test_padding_and_batches_by_hand() -> None:
    rows = [Encoded([5, 6], 1), Encoded([7, 8, 9], 2), Encoded([4], 0)]
    assert by_length(rows, 2) == [[1, 0], [2]]
    ids, mask, response = (t.tolist() for t in pad(rows, 3))
    assert ids == [[5, 6, 3], [7, 8, 9], [4, 3, 3]]
    assert mask == [[1, 1, 0], [1, 1, 1], [1, 0, 0]]
    assert response == [[0, 1, 0], [0, 0, 1], [1, 0, 0]]


def test_the_least_limit_counts() -> None:
    tokenizer, causal = load_tokenizer(BASE), load_language_model(BASE)
    assert token_limit(causal, tokenizer) == 128
    assert token_limit(causal, tokenizer, 20) == 20
    assert token_limit(causal, tokenizer, 500) == 128
    tokenizer.model_max_length = 64
    assert token_limit(causal, tokenizer) == 64
    tokenizer.model_max_length = int(1e30)  # as tokenizers without a limit say
    assert token_limit(causal, tokenizer) == 128


# Checkpoints ---------------------------------------------------------------------------------------------


class Stopped(Exception):
    pass


def stop_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the training fail after so many steps."""
    from oirl.rewards import scalar_head

    step, done = scalar_head._step, [0]

    def failing(*arguments: Any) -> Any:
        if done[0] == count:
            raise Stopped
        done[0] += 1
        return step(*arguments)

    monkeypatch.setattr(scalar_head, "_step", failing)


@pytest.mark.parametrize("options", [{}, {"lora_rank": 2}, {"imitation": 0.1, "micro_batch": 3}], ids=str)
def test_a_stopped_run_goes_on_to_the_same_weights(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    options = options | {"save_every": 3, "epochs": 2}
    whole = model(**options).fit(PAIRS.slice(0, 40))
    with monkeypatch.context() as patch:
        stop_after(5, patch)
        with pytest.raises(Stopped):
            model(**options).fit(PAIRS.slice(0, 40), checkpoints=tmp_path / "c")
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["step-3"]
    with monkeypatch.context() as patch:
        stop_after(7, patch)  # of 5 steps to an epoch, 10 in all, 7 are left
        resumed = model(**options).fit(PAIRS.slice(0, 40), checkpoints=tmp_path / "c")
    assert same(resumed, whole, 0)
    assert resumed.metrics_ == whole.metrics_


def test_a_checkpoint_cut_off_in_the_middle_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        with pytest.raises(Stopped):
            model(save_every=2).fit(PAIRS.slice(0, 40), checkpoints=tmp_path)
    (tmp_path / "step-4").mkdir()
    (tmp_path / "step-4" / "model.safetensors").write_bytes(b"half")
    with monkeypatch.context() as patch:
        stop_after(3, patch)  # 5 steps in all, 2 of them done
        resumed = model(save_every=2).fit(PAIRS.slice(0, 40), checkpoints=tmp_path)
    assert same(resumed, model(save_every=2).fit(PAIRS.slice(0, 40)), 0)


@pytest.mark.parametrize("other", [{"learning_rate": 1e-3}, {"seed": 1}, {"pairs": 39}], ids=str)
def test_checkpoints_of_another_run_are_refused(
    other: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        with pytest.raises(Stopped):
            model(save_every=2).fit(PAIRS.slice(0, 40), checkpoints=tmp_path)
    pairs = PAIRS.slice(0, other.pop("pairs", 40))
    with pytest.raises(ConfigError, match="another run"):
        model(save_every=2, **other).fit(pairs, checkpoints=tmp_path)


def command(*arguments: str | Path) -> tuple[list[str], dict[str, str]]:
    paths = os.pathsep.join(str(ROOT / p) for p in (".", "cli", "data"))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return [*map(str, arguments)], environment


@pytest.mark.slow
def test_a_killed_command_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    save_pairs(PAIRS, tmp_path / "pairs.parquet")
    options = ["batch=8", "learning_rate=0.003", "heads=3", "epochs=5", "save_every=4"]
    fit = [sys.executable, "-m", "oirl_cli", "fit", tmp_path / "pairs.parquet", "--target", "preference"]
    fit += ["--model", f"language-model:{BASE}", *(x for option in options for x in ("--set", option)), "--out"]
    whole, environment = command(*fit, tmp_path / "whole")
    subprocess.run(whole, env=environment, check=True, capture_output=True, timeout=300)
    again, _ = command(*fit, tmp_path / "again")
    checkpoints = tmp_path / "again.checkpoints"
    process = subprocess.Popen(again, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("step-*/progress.json")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "again").exists()
    assert list(checkpoints.glob("step-*/progress.json"))
    other = subprocess.run([*again, "--seed", "1"], env=environment, capture_output=True, text=True, check=False)
    assert other.returncode == 2
    assert "another run" in other.stderr  # so what is there is looked at
    subprocess.run(again, env=environment, check=True, capture_output=True, timeout=300)
    assert not checkpoints.exists()
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
    heads = [np.load(tmp_path / name / "weights.npz")["head"] for name in ("again", "whole")]
    assert (heads[0] == heads[1]).all()


SCRIPT = """
import sys
from pathlib import Path
import torch
from oirl.logs.pairs import read_pairs
from oirl.rewards.language_model import LanguageModelRewardModel

def run() -> None:
    folder, base = Path(sys.argv[1]), sys.argv[2]
    model = LanguageModelRewardModel(base, batch=8, learning_rate=1e-4, heads=3, save_every=2)
    model.fit(read_pairs(folder / "pairs.parquet"), checkpoints=folder / "c")
    from accelerate import PartialState
    torch.save(model._model.state_dict(), folder / f"{PartialState().process_index}.pt")
    print(PartialState().num_processes)

run()
"""


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    pairs = PAIRS.slice(0, 80)
    save_pairs(pairs, tmp_path / "pairs.parquet")
    (tmp_path / "script.py").write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments, environment = command(*launch, tmp_path / "script.py", tmp_path, BASE)
    environment |= {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2", "2"]
    one = weights(model(learning_rate=1e-4, save_every=2).fit(pairs))
    for process in (0, 1):
        two = torch.load(tmp_path / f"{process}.pt", weights_only=True)
        assert two.keys() == one.keys()
        assert all(torch.allclose(two[name], one[name], rtol=0, atol=2e-6) for name in one)


# The saved form -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapted() -> LanguageModelRewardModel:
    pytest.importorskip("peft")
    return model(lora_rank=4, learning_rate=1e-2).fit(PAIRS)


@pytest.fixture(scope="module", params=["whole", "adapters"])
def either(request: pytest.FixtureRequest) -> LanguageModelRewardModel:
    return request.getfixturevalue({"whole": "fitted", "adapters": "adapted"}[request.param])


def test_a_saved_model_says_the_same(either: LanguageModelRewardModel, tmp_path: Path) -> None:
    either.save(tmp_path / "m")
    again = load(tmp_path / "m")
    queries, responses = NEW["query"].to_pylist(), NEW["chosen"].to_pylist()
    before, after = either.estimate(queries, responses), again.estimate(queries, responses)
    assert (before.reward == after.reward).all()
    assert (before.spread == after.spread).all()
    assert again.get_params() == either.get_params()
    assert (again.data_, again.metrics_, again.warnings_) == (either.data_, either.metrics_, either.warnings_)
    assert again.seen_.overlap(PAIRS["query"].to_pylist()) == either.seen_.overlap(PAIRS["query"].to_pylist())
    again.save(tmp_path / "again")
    assert (load(tmp_path / "again").estimate(queries, responses).reward == before.reward).all()


def test_a_folder_holds_plain_files_only(either: LanguageModelRewardModel, tmp_path: Path) -> None:
    either.save(tmp_path / "m")
    files = [p.name for p in (tmp_path / "m").rglob("*")]
    assert [name for name in files if not any(fnmatchcase(name, kind) for kind in FILES)] == []
    text = b"".join(p.read_bytes() for p in (tmp_path / "m").iterdir())
    assert PAIRS["query"][0].as_py().encode() not in text


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", "tokenizer.json"])
def test_a_changed_file_is_refused(either: LanguageModelRewardModel, suffix: str, tmp_path: Path) -> None:
    either.save(tmp_path / "m")
    (file,) = [p for p in (tmp_path / "m").iterdir() if p.name.endswith(suffix)]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(ModelFileError, match="changed since it was written"):
        load(tmp_path / "m")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "modeling_evil.py"])
def test_a_file_that_is_not_listed_or_not_plain_is_refused(
    fitted: LanguageModelRewardModel, name: str, tmp_path: Path
) -> None:
    fitted.save(tmp_path / "m")
    (tmp_path / "m" / name).write_text("raise SystemExit")
    with pytest.raises(ModelFileError, match="do not match"):
        load(tmp_path / "m")
    manifest = json.loads((tmp_path / "m" / "manifest.json").read_text())
    from hashlib import sha256

    manifest["files"][name] = sha256(b"raise SystemExit").hexdigest()
    (tmp_path / "m" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ModelFileError, match="holds no such file"):
        load(tmp_path / "m")


def test_heads_of_another_model_are_refused(fitted: LanguageModelRewardModel, tmp_path: Path) -> None:
    fitted.save(tmp_path / "m")
    manifest = json.loads((tmp_path / "m" / "manifest.json").read_text())
    manifest["model"]["heads"] = 4
    (tmp_path / "m" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ModelFileError, match="heads"):
        load(tmp_path / "m")


def test_adapters_leave_the_base_as_it_was(adapted: LanguageModelRewardModel) -> None:
    base = load_language_model(BASE, dtype="float32").state_dict()
    found = {k.replace(".base_layer", ""): v for k, v in adapted._model.causal.state_dict().items() if "lora" not in k}
    assert found.keys() == base.keys()
    assert all(torch.equal(found[name], base[name]) for name in base)
    ahead = [v for k, v in adapted._model.causal.state_dict().items() if "lora_B" in k]
    assert len(ahead) >= 3 * 7  # all linear layers of three blocks
    assert any(bool(v.abs().max() > 0) for v in ahead)
    assert (differences(adapted) > 0).mean() > 0.9


def test_a_folder_of_adapters_is_small_and_names_its_base(adapted: LanguageModelRewardModel, tmp_path: Path) -> None:
    adapted.save(tmp_path / "m")
    (weights_file,) = (tmp_path / "m").glob("*.safetensors")
    assert weights_file.stat().st_size < (small_lm_path() / "model.safetensors").stat().st_size / 4
    assert json.loads((tmp_path / "m" / "manifest.json").read_text())["model"]["base"] == BASE


def test_a_language_model_takes_no_embedder(fitted: LanguageModelRewardModel, tmp_path: Path) -> None:
    fitted.save(tmp_path / "m")
    with pytest.raises(ConfigError, match="no embedder"):
        load(tmp_path / "m", embedder="tfidf")


# What is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"ranking": 0.0}, "ranking"),
        ({"ranking": -1.0}, "ranking"),
        ({"imitation": -0.1}, "imitation"),
        ({"imitation": "much"}, "imitation"),
        ({"imitation": float("nan")}, "imitation"),
        ({"centring": -0.1}, "centring"),
        ({"margin": "all"}, "margin"),
        ({"epochs": 0}, "epochs"),
        ({"epochs": 1.5}, "epochs"),
        ({"batch": 0}, "batch"),
        ({"batch": 2.5}, "batch"),
        ({"micro_batch": 0}, "micro_batch"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"lora_rank": -1}, "lora_rank"),
        ({"lora_rank": 1.5}, "lora_rank"),
        ({"heads": 0}, "heads"),
        ({"heads": 2.5}, "heads"),
        ({"save_every": 0}, "save_every"),
        ({"max_length": 0}, "max_length"),
        ({"max_length": -5}, "max_length"),
        ({"max_length": "many"}, "max_length"),
        ({"gradient_checkpointing": "no"}, "gradient_checkpointing"),
        ({"seed": -1}, "seed"),
    ],
    ids=str,
)
def test_bad_parameters_are_refused_in_one_line(options: dict[str, Any], word: str) -> None:
    with pytest.raises(OirlError) as e:
        model(**options).fit(PAIRS.slice(0, 20))
    assert word in str(e.value)
    assert "\n" not in str(e.value)


def test_parameters_of_a_user() -> None:
    assert parameters_of(None) == {}
    assert parameters_of({"epochs": 2}) == {"epochs": 2}
    for name in ("epoch", "base", "seed", "margin"):
        with pytest.raises(ConfigError, match=f"no parameter '{name}'.*learning_rate"):
            parameters_of({name: 1})


def test_a_base_that_is_none_is_one_line(tmp_path: Path) -> None:
    for base in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ConfigError, match="cannot load the language model") as e:
            LanguageModelRewardModel(str(base)).fit(PAIRS.slice(0, 20))
        assert "\n" not in str(e.value)


def test_weights_that_are_a_pickle_are_not_read(tmp_path: Path) -> None:
    for file in small_lm_path().glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(load_language_model(BASE).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="cannot load"):
        load_language_model(str(tmp_path))


def test_pairs_that_teach_nothing_are_refused() -> None:
    with pytest.raises(DataError, match="no pair"):
        model().fit(PREFERENCE_SCHEMA.empty_table())
    with pytest.raises(DataError, match="two unlike queries"):
        model().fit(PAIRS.slice(0, 1))


def test_what_is_not_fitted_says_so(tmp_path: Path) -> None:
    with pytest.raises(NotFittedError):
        model().estimate(["q"], ["r"])
    with pytest.raises(NotFittedError):
        model().save(tmp_path / "m")


def test_unlike_lengths_are_refused(fitted: LanguageModelRewardModel) -> None:
    with pytest.raises(ConfigError, match="2 queries, 1 responses"):
        fitted.estimate(["a", "b"], ["c"])


def test_a_clone_has_the_same_parameters_and_no_state(fitted: LanguageModelRewardModel) -> None:
    other = fitted.clone()
    assert other.get_params() == fitted.get_params()
    assert not hasattr(other, "seen_")
