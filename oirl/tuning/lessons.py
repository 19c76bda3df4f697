"""What each method learns from rollouts: chosen, relabelled, turned into examples, with figures of what they are."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np

from oirl.errors import ConfigError, DataError
from oirl.registry import create, resolve
from oirl.tuning.choosing import best_per_query, first_of_equals, top_fraction, variety
from oirl.tuning.examples import Encoder, Example, suboutput_examples
from oirl.tuning.relabelling import ByFunction, Outcome, Relabelling, check_instructions, instruct, preferred
from oirl.tuning.rollouts import Rollout
from oirl.tuning.scoring import Scorer, whole_rewards
from oirl.tuning.settings import Filter, Hir, Raft, Settings


class NothingToLearnError(DataError):
    """Of all responses of an iteration there is none to learn from."""


class Chosen(NamedTuple):
    """Rollouts that are learned from, with the template under which each is.

    Attributes:
        rollouts: Length n.
        templates: Length n.
        others: The templates that each is held against.
    """

    rollouts: list[Rollout]
    templates: list[str]
    others: list[tuple[str, ...]]


class Method:
    """What a method makes of rollouts.

    Args:
        settings: Of the method.
        scorer: Rewards, None where a method has none.
    """

    def __init__(self, settings: Settings, scorer: Scorer | None = None) -> None:
        self.settings = settings
        self._scorer = scorer
        self.relabelling = make_relabelling(settings.relabel) if isinstance(settings, Hir) else None

    def asked(self, prompt: str) -> dict[str, str]:
        """Return name -> template under which queries may be asked for a prompt; the first is what counts."""
        if self.relabelling is None:
            return {"prompt": prompt}
        rest = [text for text in self.relabelling.instructions if text != self.relabelling.wanted]
        return {f"instruction_{i}": instruct(text, prompt) for i, text in enumerate([self.relabelling.wanted, *rest])}

    def learned(self, prompts: Sequence[str], given: Collection[str]) -> tuple[str, dict[str, str]]:
        """Return a prompt, and what `asked` gives for it, as far as something was learned under it.

        Args:
            prompts: That may be asked, the one to ask first.
            given: All templates that something was learned under.

        Raises:
            DataError: If nothing was learned under what is to be asked for.
        """
        best = [self.asked(prompt) for prompt in prompts]
        wanted = ["{prompt}"] if self.relabelling is None else preferred(self.relabelling)
        for text in wanted:
            for prompt, names in zip(prompts, best, strict=True):
                own = instruct(text, prompt)
                if own in given:
                    first = {name: template for name, template in names.items() if template == own}
                    return prompt, first | {name: template for name, template in names.items() if template in given}
        if self.relabelling is None:
            raise DataError(f"nothing can be learned of responses to the prompt {prompts[0]!r}; name another `prompt`")
        raise DataError(
            f"no response follows {instruct(wanted[0], prompts[0])!r}, which is to be asked for, so that nothing would "
            "be learned under it; learn from other responses, or relabel otherwise"
        )

    def choose(self, rollouts: Sequence[Rollout], penalties: np.ndarray | None = None) -> tuple[Chosen, dict[str, Any]]:
        """Return what is learned from, and figures of all rollouts and of those chosen.

        Args:
            rollouts: All of an iteration.
            penalties: Taken off the rewards, float (n,).

        Raises:
            NothingToLearnError: If there is nothing to learn from.
        """
        if not rollouts:
            raise NothingToLearnError("there is no response to learn from")
        figures = rollout_figures(rollouts)
        if isinstance(self.settings, Filter):
            found = [r for r in rollouts if r.correct is True]
            if not found:
                raise NothingToLearnError(
                    f"none of the {len(rollouts):,} responses is right, so there is nothing to learn from; give the "
                    "log verdicts (`oirl import --grade`), or learn from all of it (sft, hir)"
                )
            return _plain(found), figures
        if self._scorer is None:
            return _plain(rollouts), figures
        rewards = whole_rewards(self._scorer(rollouts))
        if np.isnan(rewards).all() and isinstance(self.settings, Raft):
            raise NothingToLearnError(f"no response has a reward ({self.settings.reward}); {_way_out(self.settings)}")
        known = rewards[~np.isnan(rewards)]
        figures |= {"reward": float(known.mean()) if len(known) else None, "no_reward": 1 - len(known) / len(rewards)}
        if penalties is not None:
            rewards = rewards - penalties
            figures |= {"kl": float(penalties.mean() / self.settings.kl_coef)}  # type: ignore[attr-defined]
        if isinstance(self.settings, Raft):
            return self._best(rollouts, rewards, figures)
        return self._relabelled(rollouts, rewards), figures

    def _best(
        self, rollouts: Sequence[Rollout], rewards: np.ndarray, figures: dict[str, Any]
    ) -> tuple[Chosen, dict[str, Any]]:
        how = self.settings
        assert isinstance(how, Raft)
        queries = [r.query_id for r in rollouts]
        once = first_of_equals(queries, [r.response for r in rollouts])
        finished = np.array([rollouts[i].finished for i in once], dtype=bool)
        values = np.where(finished, rewards[once], np.nan)  # what was cut off is not to be imitated
        least, of_queries = how.least_reward, [queries[i] for i in once]
        if how.select == "best_per_query":
            places = best_per_query(values, of_queries, least=least)
        else:
            places = top_fraction(values, how.top_fraction, least=least)
        if not len(places):
            floor = "" if least is None else f" of {least:g} or more"
            raise NothingToLearnError(
                f"none of {len(rollouts):,} responses has a reward{floor} and an end (rewards go from "
                f"{np.nanmin(rewards):.4g} to {np.nanmax(rewards):.4g}); lower min_reward, or sample more"
            )
        found = [rollouts[i] for i in once[places]]
        rewarded = {q for q, v in zip(of_queries, values, strict=True) if v >= (-math.inf if least is None else least)}
        figures |= {
            "duplicates": 1 - len(once) / len(rollouts),
            "queries_without_reward": 1 - len(rewarded) / len(set(queries)),
            "chosen": len(found),
            "chosen_reward": float(rewards[once[places]].mean()),
        }
        figures |= {f"chosen_{name}": value for name, value in variety([r.response for r in found]).items()}
        return _plain(found), figures

    def _relabelled(self, rollouts: Sequence[Rollout], rewards: np.ndarray) -> Chosen:
        relabelling = self.relabelling
        assert relabelling is not None
        outcomes = [
            Outcome(r.prompt, r.query, r.response, r.correct, None if np.isnan(value) else float(value))
            for r, value in zip(rollouts, rewards, strict=True)
        ]
        chosen = Chosen([], [], [])
        for rollout, own in zip(rollouts, relabelling.relabel(outcomes), strict=True):
            if own is None:
                continue
            chosen.rollouts.append(rollout)
            chosen.templates.append(instruct(own, rollout.prompt))
            rest = (text for text in relabelling.instructions if text != own)
            chosen.others.append(tuple(instruct(text, rollout.prompt) for text in rest))
        if not chosen.rollouts:
            raise NothingToLearnError(
                "no response could be relabelled: none has what the relabelling looks at (verdict, reward)"
            )
        return chosen


def make_examples(
    chosen: Chosen, encoder: Encoder, settings: Settings, rng: np.random.Generator
) -> tuple[list[Example], Counter[str]]:
    """Return the examples of chosen rollouts, sub-outputs among them, and how many responses each template has.

    The encoder counts the rollouts that there is no example of.

    Raises:
        NothingToLearnError: If there is not one.
    """
    held_against = isinstance(settings, Hir) and settings.contrastive == "opposite"
    examples = []
    given: Counter[str] = Counter()
    for rollout, template, others in zip(*chosen, strict=True):
        example = encoder.example(rollout, template, others if held_against else ())
        if example is not None:
            examples.append(example)
            given[template] += 1
            if isinstance(settings, Hir):
                examples += suboutput_examples(example, settings.suboutputs, rng)
    if not examples:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in encoder.left_out.most_common())
        raise NothingToLearnError(f"none of {len(chosen.rollouts):,} chosen responses can be learned from: {reasons}")
    return examples, given


def lesson_hash(examples: Sequence[Example]) -> str:
    """Return a hash of all that examples hold, in their order."""
    digest = blake2b(digest_size=16)
    for example in examples:
        digest.update(repr((example.context, example.response, example.given, example.others)).encode())
    return digest.hexdigest()


def make_relabelling(entries: dict[str, Any]) -> Relabelling:
    """Return a relabelling by its name and parameters, checked.

    Raises:
        UnknownNameError: If there is none of that name.
        ConfigError: If a parameter or an instruction is not allowed.
    """
    params = {k: v for k, v in entries.items() if k != "name"}
    name = entries["name"]
    found = resolve("relabellings", name)
    if isinstance(found, type):
        try:
            made: Relabelling = create("relabellings", name, params)
        except (TypeError, AttributeError) as e:
            raise ConfigError(f"the relabelling {name!r}: {e}") from e
    else:
        instructions = params.get("instructions")
        if not isinstance(instructions, list) or not instructions or set(params) != {"instructions"}:
            raise ConfigError(
                f"the relabelling {name!r} is a function: give it `instructions`, a list of all that it can return, "
                "the one to ask for first, and nothing else"
            )
        made = ByFunction(found, instructions)
    check_instructions(made)
    return made


def _plain(rollouts: Sequence[Rollout]) -> Chosen:
    return Chosen(list(rollouts), [r.prompt for r in rollouts], [()] * len(rollouts))


def rollout_figures(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """Return what is said of rollouts as they are: how many, how many are right, how varied they are."""
    known = [r.correct for r in rollouts if r.correct is not None]
    drawn = [value for r in rollouts for value in r.logprobs or ()]
    found: dict[str, Any] = {
        "responses": len(rollouts),
        "queries": len({r.query_id for r in rollouts}),
        "success": sum(known) / len(known) if known else None,
        "cut_off": sum(not r.finished for r in rollouts) / len(rollouts),
    }
    if drawn:  # of draws at temperature 1 the mean of −log π estimates the entropy of the next token
        found |= {"tokens": len(drawn), "surprise": -sum(drawn) / len(drawn)}
    shown = variety([r.response for r in rollouts])
    return found | {name: None if math.isnan(value) else value for name, value in shown.items()}


def _way_out(settings: Any) -> str:
    if settings.reward == "verdict":
        return "verdicts come from `oirl import --grade`, or here from `grade` and queries with an `answer`"
    return "see what it returns for these responses"
