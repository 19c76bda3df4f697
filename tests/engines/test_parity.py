"""Parity: an engine that reports what a forward pass gives agrees, and every way of not doing so is seen."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from conftest import run_oirl

from oirl.engines.base import Completion, Engine, EngineError, Request, Sampling
from oirl.engines.parity import TEXTS, THRESHOLDS, ParityReport, check_parity, difference
from oirl.engines.transformers_engine import TransformersEngine
from oirl.errors import ConfigError, OirlError
from oirl.language_models import load_language_model, load_tokenizer
from oirl_data import small_lm_path

BASE = str(small_lm_path())
END = 2
CASES = [
    "greedy",
    "temperature 1",
    "temperature 0.7, log-probs raw",
    "temperature 0.7, top-p 0.9",
    "scoring given tokens, against sampling them",
]
CHAT = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} . {% endfor %}Answer"


@cache
def loaded() -> tuple[Any, Any]:
    return load_language_model(BASE), load_tokenizer(BASE)


@pytest.fixture(scope="module")
def reference() -> TransformersEngine:
    return TransformersEngine(*loaded())


def perturbed(size: float) -> Any:
    """Return the model with weights that are a little off."""
    model = load_language_model(BASE)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + size * torch.randn(parameter.shape, generator=generator))
    return model


class Double(Engine):
    """The engine of the reference, whose completions are changed on the way.

    Args:
        inner: Responds.
        change: Of a completion.
        told: What it says of itself.
        scores: What it makes of the log-probs of given tokens; None if it cannot score.
    """

    name = "double"

    def __init__(
        self,
        inner: TransformersEngine,
        change: Callable[[Completion], Completion] = lambda c: c,
        told: dict[str, Any] | None = None,
        scores: Callable[[float], float] | None = None,
    ) -> None:
        self.model, self.chat = inner.model, inner.chat
        self._inner, self._change, self._scores = inner, change, scores
        self._told = {"engine": "double"} if told is None else told

    def stream(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[tuple[int, list[Completion]]]:
        for position, completions in self._inner.stream(requests, sampling):
            yield position, [c if c.text is None else self._change(c) for c in completions]

    def describe(self) -> dict[str, Any]:
        return self._told

    def score(self, prompt_ids: Sequence[Sequence[int]], token_ids: Sequence[Sequence[int]]) -> list[list[float]]:
        if self._scores is None:
            return super().score(prompt_ids, token_ids)
        return [[self._scores(x) for x in row] for row in self._inner.score(prompt_ids, token_ids)]


def shifted(completion: Completion, by: float) -> Completion:
    return replace(completion, logprobs=tuple(x + by for x in completion.logprobs or ()))


def check(engine: Engine, reference: TransformersEngine, **options: Any) -> ParityReport:
    return check_parity(engine, reference, **{"max_tokens": 6, **options})


def agreed(report: ParityReport) -> dict[str, bool]:
    return {d.case: d.agrees for d in report.differences}


# Figures


def test_a_difference_by_hand() -> None:
    found = difference("x", [-1.0, -2.0, -3.0], [-1.0, -1.5, -4.0], 0.5)
    assert (found.case, found.tokens) == ("x", 3)
    assert found.mean_abs == pytest.approx((0 + 0.5 + 1.0) / 3)
    assert found.max_abs == pytest.approx(1.0)
    # r - 1 - log r of r = exp(reference - engine)
    k3 = [0, math.exp(0.5) - 1 - 0.5, math.exp(-1) - 1 + 1]
    assert found.kl_k3 == pytest.approx(sum(k3) / 3)
    assert found.agrees


@pytest.mark.parametrize(("limit", "agrees"), [(0.26, True), (0.25, True), (0.24, False), (0.0, False)])
def test_the_limit_is_of_the_mean(limit: float, agrees: bool) -> None:
    assert difference("x", [-1.0, -2.0], [-1.0, -1.5], limit).agrees is agrees
    assert difference("x", [-1.0, -1.5], [-1.0, -2.0], limit).agrees is agrees  # in either direction


def test_gaps_do_not_cancel() -> None:
    found = difference("x", [-1.0, -2.0], [-2.0, -1.0], 0.5)
    assert found.mean_abs == 1
    assert found.kl_k3 > 0
    assert not found.agrees


def test_equal_logprobs_differ_by_nothing() -> None:
    found = difference("x", [-1.0, -2.0], [-1.0, -2.0], 0.0)
    assert (found.mean_abs, found.max_abs, found.kl_k3, found.agrees) == (0, 0, 0, True)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ([], []),
        ([-math.inf], [-1.0]),
        ([-1.0], [-math.inf]),
        ([-math.inf], [-math.inf]),
        ([math.nan, -1.0], [-1.0, -1.0]),
    ],
)
def test_what_cannot_be_compared_does_not_agree(ours: list[float], theirs: list[float]) -> None:
    found = difference("x", ours, theirs, 99.0)
    assert not found.agrees
    assert found.mean_abs == found.max_abs == math.inf


def test_a_gap_of_any_size_is_a_number() -> None:
    found = difference("x", [-5000.0], [-1.0], 1.0)
    assert found.mean_abs == 4999
    assert found.kl_k3 > 1e300
    assert not found.agrees


@pytest.mark.parametrize(("out", "agrees"), [(1, True), (2, True), (3, False), (100, False)])
def test_few_tokens_may_be_out_for_the_reference(out: int, agrees: bool) -> None:
    """At the edge of what top-p leaves; how many they are decides."""
    ours, theirs = [-1.0] * 100, [-math.inf] * out + [-1.01] * (100 - out)
    found = difference("x", ours, theirs, 0.02)
    assert found.agrees is agrees
    if agrees:
        assert found.tokens == 100 - out
        assert found.mean_abs == pytest.approx(0.01)
    assert not difference("x", theirs, ours, 0.02).agrees  # the engine drew what it says has no probability
    for nothing in (-math.inf, math.nan):
        assert not difference("x", [nothing, *ours[1:]], theirs, 0.02).agrees


@pytest.mark.parametrize(("wrong", "agrees"), [(0, True), (1, True), (2, False)])
def test_a_fault_in_few_places_does_not_hide_in_the_mean(wrong: int, agrees: bool) -> None:
    found = difference("x", [-1.0] * 100, [-1.9] * wrong + [-1.0] * (100 - wrong), 0.02)
    assert found.mean_abs == pytest.approx(0.009 * wrong)
    assert found.agrees is agrees


# Engines


def test_an_engine_agrees_with_itself(reference: TransformersEngine) -> None:
    report = check_parity(reference, reference)
    assert report.agrees
    assert report.threshold == THRESHOLDS["float32"]
    assert [d.case for d in report.differences] == CASES
    assert all(d.tokens >= len(TEXTS) and d.mean_abs < 1e-5 and d.kl_k3 < 1e-8 for d in report.differences)
    assert report.logprobs_are == "raw"
    assert report.prompt_tokens_agree == 1
    assert report.padding_agrees is True
    assert report.engine == report.reference == reference.describe()
    assert json.loads(json.dumps(report.to_dict()))["differences"][0]["case"] == "greedy"


def test_retokenised_is_the_share_of_texts_that_give_their_tokens(reference: TransformersEngine) -> None:
    def other_text(completion: Completion) -> Completion:
        return replace(completion, text=f"So {completion.text}") if completion.tokens_in == 7 else completion

    same = check(reference, reference)
    found = check(Double(reference, other_text), reference)
    few = sum(len(reference.tokens(text)) == 7 for text in TEXTS) / len(TEXTS)
    assert 0 < few < 1
    assert same.retokenised_agree == 1
    assert found.retokenised_agree == pytest.approx(1 - few)
    assert found.agrees  # of token ids, not of texts


def test_an_engine_that_batches_otherwise_agrees(reference: TransformersEngine) -> None:
    other = TransformersEngine(*loaded(), batch_size=3)
    report = check(other, reference)
    assert report.agrees
    assert report.padding_agrees


@pytest.mark.parametrize("size", [0.01, 0.2])
def test_a_model_that_is_a_little_off_does_not_agree(reference: TransformersEngine, size: float) -> None:
    report = check(TransformersEngine(perturbed(size), load_tokenizer(BASE)), reference)
    assert not report.agrees
    assert agreed(report) == {
        case.replace("raw", report.logprobs_are): case.startswith("scoring given") for case in CASES
    } | {"scoring given tokens, against sampling them": True}
    assert report.prompt_tokens_agree == 1


def test_more_noise_is_more_difference(reference: TransformersEngine) -> None:
    means = []
    for size in (0.003, 0.03):
        report = check(TransformersEngine(perturbed(size), load_tokenizer(BASE)), reference)
        means.append(report.differences[1].mean_abs)
    assert 0 < means[0] < means[1] / 3


def test_other_texts_and_lengths(reference: TransformersEngine) -> None:
    report = check(reference, reference, texts=["How many ?"], max_tokens=1)
    assert [d.tokens for d in report.differences] == [1] * 5
    assert report.agrees


def test_a_chat_is_asked_in_messages(reference: TransformersEngine) -> None:
    tokenizer = load_tokenizer(BASE)
    tokenizer.chat_template = CHAT
    chatty = TransformersEngine(load_language_model(BASE), tokenizer)
    seen: list[Completion] = []
    report = check(Double(chatty, lambda c: seen.append(c) or c), chatty, texts=["How many ?"])  # type: ignore[func-returns-value]
    assert report.agrees
    assert set(seen[0].prompt_ids or ()) >= set(tokenizer("Answer How many ?", add_special_tokens=False)["input_ids"])
    with pytest.raises(EngineError, match="chat template"):  # each is refused, and the report says why
        check(TransformersEngine(*loaded(), chat=True), chatty)


# Log-probs


@pytest.mark.parametrize("size", [1e-4, 0.3])
def test_the_threshold_is_that_of_the_number_type_or_as_given(reference: TransformersEngine, size: float) -> None:
    for told, limit in (({"dtype": "float32"}, 1e-3), ({"dtype": "bfloat16"}, 0.05), ({"dtype": "float16"}, 0.02)):
        report = check(Double(reference, lambda c: shifted(c, size), told), reference, texts=TEXTS[:3], max_tokens=2)
        assert report.threshold == limit
        assert report.agrees is (size < limit)
        assert report.differences[0].mean_abs == pytest.approx(size, abs=1e-5)
    silent = check(Double(reference), reference, texts=TEXTS[:3], max_tokens=2)
    assert silent.threshold == THRESHOLDS["float32"]  # that of the reference
    for threshold, agrees in ((1.0, True), (1e-5, False)):
        report = check(
            Double(reference, lambda c: shifted(c, size)), reference, texts=TEXTS[:3], max_tokens=2, threshold=threshold
        )
        assert (report.threshold, report.agrees) == (threshold, agrees)


def test_a_number_type_without_a_threshold_of_its_own(reference: TransformersEngine) -> None:
    wide = TransformersEngine(load_language_model(BASE, dtype=torch.float64), load_tokenizer(BASE))
    assert wide.describe()["dtype"] == "float64"
    assert check(wide, reference).agrees
    assert check(Double(reference, told={"dtype": "int4"}), reference).agrees


def test_processed_logprobs_are_recognised(reference: TransformersEngine) -> None:
    engine = TransformersEngine(*loaded(), logprobs_mode="processed")
    report = check(engine, reference)
    assert report.logprobs_are == "processed"
    assert report.agrees
    assert "temperature 0.7, log-probs processed" in agreed(report)


@pytest.mark.parametrize("mode", ["raw", "processed"])
def test_half_precision_agrees_with_full(reference: TransformersEngine, mode: str) -> None:
    """Which tokens top-p leaves is a matter of rounding at the threshold; that is no disagreement."""
    half = TransformersEngine(load_language_model(BASE, dtype="bfloat16"), load_tokenizer(BASE), logprobs_mode=mode)
    report = check(half, reference, max_tokens=48 if mode == "processed" else 6)
    assert report.threshold == THRESHOLDS["bfloat16"]
    assert report.logprobs_are == mode
    assert all(agreed(report).values())
    assert report.agrees
    assert report.differences[0].mean_abs > 1e-5


def test_logprobs_that_are_neither(reference: TransformersEngine) -> None:
    report = check(Double(reference, lambda c: shifted(c, -0.3)), reference)
    assert report.logprobs_are == "neither"
    assert not report.agrees
    assert set(agreed(report).values()) == {False}
    assert "temperature 0.7, log-probs neither" in agreed(report)


def test_an_engine_without_logprobs_is_an_error(reference: TransformersEngine) -> None:
    with pytest.raises(EngineError, match="'double' reports no log-probs"):
        check(Double(reference, lambda c: replace(c, logprobs=None)), reference)


def test_logprobs_that_are_no_numbers_do_not_agree(reference: TransformersEngine) -> None:
    def broken(completion: Completion) -> Completion:
        return replace(completion, logprobs=(math.nan, *(completion.logprobs or ())[1:]))

    assert not check(Double(reference, broken), reference).agrees


def test_base_2_is_seen(reference: TransformersEngine) -> None:
    def in_bits(completion: Completion) -> Completion:
        return replace(completion, logprobs=tuple(x / math.log(2) for x in completion.logprobs or ()))

    assert not check(Double(reference, in_bits), reference).agrees


def test_logprobs_one_token_late_are_seen(reference: TransformersEngine) -> None:
    def late(completion: Completion) -> Completion:
        given = completion.logprobs or ()
        return replace(completion, logprobs=(given[-1], *given[:-1]))

    report = check(Double(reference, late), reference)
    assert not report.agrees


# Tokens


def test_wrong_tokens_are_seen(reference: TransformersEngine) -> None:
    def wrong(completion: Completion) -> Completion:
        ids = list(completion.token_ids or ())
        ids[0] = 5 if ids[0] != 5 else 6
        return replace(completion, token_ids=tuple(ids))

    report = check(Double(reference, wrong), reference)
    assert not report.agrees
    assert not any(agreed(report).values())
    assert report.retokenised_agree == 0
    assert report.prompt_tokens_agree == 1


def test_tokens_that_the_reference_does_not_have_are_an_error(reference: TransformersEngine) -> None:
    """As of another model, or of one whose table of tokens was made longer."""

    def unknown(completion: Completion) -> Completion:
        return replace(completion, token_ids=(250, *(completion.token_ids or ())[1:]))

    with pytest.raises(EngineError, match="250"):
        check(Double(reference, unknown), reference)


def test_other_prompt_tokens_are_no_agreement(reference: TransformersEngine) -> None:
    def twice_begun(completion: Completion) -> Completion:
        if completion.tokens_in != 7:
            return completion
        return replace(completion, prompt_ids=(1, *(completion.prompt_ids or ())))

    report = check(Double(reference, twice_begun), reference)
    few = sum(len(reference.tokens(text)) == 7 for text in TEXTS) / len(TEXTS)
    assert all(agreed(report).values())
    assert report.prompt_tokens_agree == pytest.approx(1 - few)
    assert not report.agrees


def test_an_engine_that_reads_other_tokens_than_it_says_is_seen_by_its_logprobs(reference: TransformersEngine) -> None:
    class Misreading(TransformersEngine):
        def tokens(self, rendered: Any) -> list[int]:
            return [1, *super().tokens(rendered)]

    tokenizer = load_tokenizer(BASE)
    engine = Misreading(load_language_model(BASE), tokenizer)
    honest = check(engine, reference)
    silent = check(Double(engine, lambda c: replace(c, prompt_ids=None)), reference)
    assert honest.prompt_tokens_agree == 0
    assert silent.prompt_tokens_agree is None
    for report in (honest, silent):
        assert not report.agrees
        assert not agreed(report)["temperature 1"]


def test_an_engine_that_tells_no_token_ids_is_compared_through_its_texts(reference: TransformersEngine) -> None:
    report = check(Double(reference, lambda c: replace(c, token_ids=None, prompt_ids=None, tokens_in=None)), reference)
    plain = check(reference, reference)
    assert report.agrees
    assert report.prompt_tokens_agree is None
    assert [d.tokens for d in report.differences] == [d.tokens for d in plain.differences[:4]]


def test_an_engine_may_leave_out_the_end_token(reference: TransformersEngine) -> None:
    def unended(completion: Completion) -> Completion:
        n = len(completion.logprobs or ()) - (completion.finish_reason == "stop")
        return replace(completion, token_ids=None, logprobs=(completion.logprobs or ())[:n])

    ended = sum(c.finish_reason == "stop" for (c,) in reference.generate(TEXTS, Sampling(6)))
    report, plain = check(Double(reference, unended), reference), check(reference, reference)
    assert report.agrees
    assert ended > 0
    assert report.differences[1].tokens == plain.differences[1].tokens - ended


def test_of_several_end_tokens_that_of_the_tokenizer_is_taken(reference: TransformersEngine) -> None:
    """Chat models end turns with one and texts with another, often of a lower id; servers tell neither."""
    model = load_language_model(BASE)
    model.generation_config.eos_token_id = [1, END]
    several = TransformersEngine(model, load_tokenizer(BASE))
    assert check(several, several).retokenised_agree == 1
    assert check(Double(several, lambda c: replace(c, token_ids=None)), several).agrees


def test_texts_that_are_not_their_tokens_do_not_agree_without_ids(reference: TransformersEngine) -> None:
    words = {"9": "5", "1": "2"}

    def rewritten(completion: Completion) -> Completion:
        text = "".join(words.get(c, c) for c in completion.text or "")
        return replace(completion, text=text, token_ids=None)

    assert not check(Double(reference, rewritten), reference).agrees


# Scoring and batches


def test_an_engine_that_cannot_score_is_not_asked_to(reference: TransformersEngine) -> None:
    report = check(Double(reference), reference)
    assert report.agrees
    assert [d.case for d in report.differences] == CASES[:4]


def test_scores_that_are_not_those_of_sampling_are_seen(reference: TransformersEngine) -> None:
    right, wrong = (check(Double(reference, scores=lambda x, by=by: x + by), reference) for by in (0.0, 0.1))
    assert right.agrees
    assert agreed(right)[CASES[4]]
    assert not wrong.agrees
    assert [case for case, agrees in agreed(wrong).items() if not agrees] == [CASES[4]]


def test_responses_that_change_in_a_batch_are_told(reference: TransformersEngine) -> None:
    class Unpadded(Double):
        def stream(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[tuple[int, list[Completion]]]:
            given = list(requests)
            for position, (one,) in super().stream(given, sampling):
                yield position, [replace(one, text=f"{one.text} {len(given)}")]

    report = check(Unpadded(reference), reference)
    assert report.padding_agrees is False
    assert report.agrees  # the log-probs still are those of the tokens


# Errors


LONG, SHORT = "apples " * 300, ["How many ?", "So 12 + 5", *TEXTS]


@pytest.mark.parametrize("at", [0, 1, 10])
def test_a_text_that_fails_is_left_out(reference: TransformersEngine, at: int) -> None:
    report = check(reference, reference, texts=[*SHORT[:at], LONG, *SHORT[at:]])
    assert report.agrees
    assert report.padding_agrees
    assert report.differences[0].tokens == check(reference, reference, texts=SHORT).differences[0].tokens


def test_an_engine_that_answers_nothing_is_an_error_with_its_reason(reference: TransformersEngine) -> None:
    with pytest.raises(EngineError, match=r"that can be compared.*301 tokens"):
        check(reference, reference, texts=[LONG])


@pytest.mark.parametrize("some", [True, False])
def test_responses_without_a_logprob_for_each_token_are_an_error(reference: TransformersEngine, some: bool) -> None:
    """Of responses that are left out nothing is known; a report on the others would not say so."""

    def too_many(completion: Completion) -> Completion:
        if some and completion.tokens_in != 7:
            return completion
        return replace(completion, token_ids=None, logprobs=(-1.0,) * 200)

    with pytest.raises(EngineError, match="log-prob for each token"):
        check(Double(reference, too_many), reference)


# The command line


@pytest.fixture(scope="module")
def off(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model whose weights are a little off."""
    folder = tmp_path_factory.mktemp("models") / "off"
    shutil.copytree(BASE, folder)
    perturbed(0.05).save_pretrained(folder)
    return folder


def test_doctor_shows_a_table() -> None:
    done = run_oirl("doctor", "--engine", "transformers", "--model", BASE, "--set", "device=cpu")
    assert (done.returncode, done.stderr) == (0, "")
    for text in ("engine: ", "reference: ", BASE, "mean |Δ|", "temperature 0.7, log-probs raw", "0.001 nats"):
        assert text in done.stdout
    assert "\nagrees" in done.stdout
    assert "NO" not in done.stdout
    assert done.stdout.count("yes") == len(CASES) + 1
    assert "same prompt tokens: 100" in done.stdout


def test_doctor_exits_2_where_the_weights_are_others(off: Path) -> None:
    given = ("--model", off, "--reference", BASE, "--set", "device=cpu", "--json")
    done = run_oirl("doctor", "--engine", "transformers", *given)
    assert done.returncode == 2
    report = json.loads(done.stdout)
    assert report["agrees"] is False
    assert report["threshold"] == 0.001
    assert report["engine"]["model"] == str(off)
    assert report["reference"]["model"] == BASE
    assert [d["case"] for d in report["differences"]][:2] == CASES[:2]
    assert all(isinstance(d["mean_abs"], float) for d in report["differences"])
    assert "are not those of a plain forward pass" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def in_process(*arguments: str | Path) -> tuple[BaseException | None, str]:
    """Run `oirl doctor` within this process, which has loaded everything: what it raises and prints."""
    from typer.testing import CliRunner

    from oirl_cli.main import app

    done = CliRunner().invoke(app, ["doctor", *map(str, arguments)])
    return done.exception, done.stdout


def test_doctor_shows_where_it_does_not_agree(off: Path) -> None:
    error, shown = in_process("--engine", "transformers", "--model", off, "--reference", BASE)
    assert isinstance(error, EngineError)
    assert "DOES NOT AGREE" in shown
    assert shown.count("NO\n") + shown.count("NO ") >= 4
    assert "yes" in shown  # scoring and sampling are both of the same wrong weights
    error, shown = in_process("--engine", "transformers", "--model", off, "--reference", BASE, "--threshold", "50")
    assert error is None
    assert "50 nats" in shown


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a LoRA adapter that changes what the model says."""
    peft = pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("adapters") / "lora"
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(load_language_model(BASE), config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved_in_half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the model saved in bfloat16."""
    folder = tmp_path_factory.mktemp("models") / "half"
    shutil.copytree(BASE, folder)
    load_language_model(BASE).to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_doctor_compares_an_adapter_with_the_same_adapter(adapter: Path) -> None:
    given = ("--engine", "transformers", "--model", BASE, "--set", f"adapter={adapter}", "--json")
    for reference in ([], ["--reference", BASE]):
        error, shown = in_process(*given, *reference)
        assert error is None
        report = json.loads(shown)
        assert report["reference"]["model"] == report["engine"]["model"] == f"{BASE}+{adapter}"
    bare = TransformersEngine(*loaded())
    assert not check_parity(TransformersEngine(BASE, adapter=str(adapter)), bare).agrees  # it was worth checking


@pytest.mark.parametrize(
    ("saved", "dtype", "threshold"),
    [("half", "float32", 1e-3), ("half", "float16", 0.05), ("half", "bfloat16", 0.05), ("full", "float16", 0.02)],
)
def test_doctor_compares_number_types_that_fit_each_other(
    saved_in_half: Path, saved: str, dtype: str, threshold: float
) -> None:
    model = saved_in_half if saved == "half" else BASE
    error, shown = in_process("--engine", "transformers", "--model", model, "--set", f"dtype={dtype}", "--json")
    assert error is None
    report = json.loads(shown)
    assert (report["engine"]["dtype"], report["threshold"]) == (dtype, threshold)


def test_the_threshold_is_that_of_the_coarser_type(reference: TransformersEngine, saved_in_half: Path) -> None:
    """A server is asked for its log-probs, and its number type is not told."""
    with TransformersEngine(str(saved_in_half)) as half:
        assert check(Double(reference), half).threshold == THRESHOLDS["bfloat16"]


@pytest.mark.parametrize("threshold", ["0", "-1", "nan", "inf"])
def test_doctor_refuses_thresholds_that_say_nothing(threshold: str) -> None:
    error, shown = in_process("--engine", "transformers", "--model", "/nowhere", "--threshold", threshold)
    assert isinstance(error, ConfigError)
    assert str(error) == f"threshold = {float(threshold):g}; allowed: a finite number above 0"
    assert shown == ""


def test_doctor_gives_json_where_it_agrees() -> None:
    error, shown = in_process("--engine", "transformers", "--model", BASE, "--set", "logprobs_mode=processed", "--json")
    assert error is None
    report = json.loads(shown)
    assert (report["agrees"], report["logprobs_are"]) == (True, "processed")
    assert len(report["differences"]) == len(CASES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "transformers"], "--engine needs --model"),
        (["--engine", "transformer", "--model", BASE], "did you mean 'transformers'"),
        (["--model", BASE], "go with --engine"),
        (["--threshold", "0"], "go with --engine"),
        (["--set", "batch_size=4"], "go with --engine"),
        (["--engine", "transformers", "--model", BASE, "--set", "model=x"], "--set model"),
    ],
)
def test_doctor_refuses_what_it_cannot_do(arguments: list[str], message: str) -> None:
    error, shown = in_process(*arguments)
    assert isinstance(error, OirlError)
    assert message in str(error)
    assert shown == ""


def test_doctor_without_a_model_exits_2() -> None:
    done = run_oirl("doctor", "--engine", "transformers")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "oirl: --engine needs --model, the model to run\n"
