"""What a run of `oirl tune apa|ppo|awr` is told; defaults are those of 2306.02231 and, for PPO, of trlX."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from oirl.tuning.settings import Sampled


class Online(Sampled):
    """What online methods share: each iteration draws responses, rewards them, and learns from these only.

    Attributes:
        iterations: Rounds of drawing and learning.
        rollouts: Responses of an iteration; a multiple of `samples`.
        samples: Responses to each query among them.
        epochs: Passes over the rollouts of an iteration.
        batch: Rollouts of an update, over all devices.
        schedule: How the learning rate goes on after the warm-up, over all iterations.
        warmup: Share of the iterations.
        save_every: Iterations between checkpoints.
        evaluate_every: Iterations between validations.
        validation_temperature: 1 measures the policy as it is trained; 0 takes the likeliest tokens.
        average: Whether all tokens count alike in a loss ("token"), or all responses ("sequence").
        baseline: What is taken off the reward: a value network of its own, a head on the policy, or the mean reward of
            a query's responses, with the response ("group") or without it ("leave_one_out").
        gamma: Discount γ.
        gae_lambda: λ of generalised advantage estimation.
        whiten: What is done to an iteration's advantages: none, centre, standardise.
        value_coef: Of the value loss where the values are a head on the policy.
        value_learning_rate: Of the value network; that of the policy when null.
        value_clip: How far values may move in an iteration; null for no limit.
        entropy_coef: β of the entropy bonus −β Σ π log π.
        importance_cap: C of truncated importance weights π_old/π_engine; null for none.
        train_layers: Train the last so many layers only; null for all.
        kl_coef: λ of APA and AWR, which divide by it; β of PPO, which takes β · KL off the reward.
        reward_scale: "running" divides rewards by the standard deviation of all so far.
        reward_clip: Rewards are cut to ± this; null for no limit.
        missing_eos_penalty: Taken off the reward of a response that was cut off.
        gold: What the policy is held to on held-out queries, and never trained on: "verdict" (of `grade`), "spread"
            (the reward model's reward less twice its spread), the folder of a reward model, package.module:function or
            an address; by default the verdict where there is one.
        guard_gold: Whether the run stops, or goes back, when the reward rises on held-out queries while gold falls.
        max_kl: The largest KL of a response from the reference, in nats, that is let pass.
        max_drift: The largest factor by which the length of responses, or the share of distinct pairs of words, may
            change against the first iteration. A factor of 2 is warned of.
        on_exceed: What is done beyond a limit, and where a loss is no number: "stop"; "rollback" to the last checkpoint
            within it, with kl_coef doubled; "raise_kl_coef" by half, and go on.
        refit_reward_every: Iterations after which the reward model is fitted anew, to `refit_log` and all rollouts.
        refit_log: The log that the reward model was fitted to.
    """

    iterations: int = Field(100, ge=1)
    rollouts: int = Field(64, ge=2)
    samples: int = Field(1, ge=1)
    epochs: int = Field(2, ge=1)
    learning_rate: float = Field(1e-5, gt=0, allow_inf_nan=False)
    schedule: Literal["linear", "cosine", "constant"] = "constant"
    warmup: float = Field(0.0, ge=0, le=1)
    save_every: int = Field(10, ge=1)
    evaluate_every: int = Field(10, ge=1)
    average: Literal["token", "sequence"] = "token"
    baseline: Literal["value_network", "value_head", "group", "leave_one_out"] = "value_network"
    validation_temperature: float = Field(1.0, ge=0, allow_inf_nan=False)
    gamma: float = Field(1.0, ge=0, le=1)
    gae_lambda: float = Field(0.95, ge=0, le=1)
    whiten: Literal["none", "centre", "standardise"] = "standardise"
    value_coef: float = Field(1.0, gt=0, allow_inf_nan=False)
    value_learning_rate: float | None = Field(None, gt=0, allow_inf_nan=False)
    value_clip: float | None = Field(None, gt=0, allow_inf_nan=False)
    entropy_coef: float = Field(0.0, ge=0, allow_inf_nan=False)
    importance_cap: float | None = Field(None, ge=1, allow_inf_nan=False)
    train_layers: int | None = Field(None, ge=1)
    kl_coef: float = Field(0.1, gt=0, allow_inf_nan=False)
    reward_scale: Literal["none", "running"] = "none"
    reward_clip: float | None = Field(10.0, gt=0, allow_inf_nan=False)
    missing_eos_penalty: float = Field(0.0, ge=0, allow_inf_nan=False)
    gold: str | None = None
    guard_gold: bool = True
    max_kl: float | None = Field(None, gt=0, allow_inf_nan=False)
    max_drift: float | None = Field(None, gt=1, allow_inf_nan=False)
    on_exceed: Literal["stop", "rollback", "raise_kl_coef"] = "stop"
    refit_reward_every: int | None = Field(None, ge=1)
    refit_log: tuple[str, ...] = ()

    @property
    def gold_reward(self) -> str | None:
        """What the policy is held to."""
        return self.gold or ("verdict" if self.grade else None)

    @property
    def value_rate(self) -> float:
        """The learning rate of the value network."""
        return self.value_learning_rate or self.learning_rate

    @model_validator(mode="after")
    def _rollouts(self) -> Online:
        if self.rollouts % self.samples:
            raise ValueError(f"rollouts = {self.rollouts} is no multiple of samples = {self.samples}")
        if self.baseline in ("group", "leave_one_out") and self.samples < 2 and self.queries:
            raise ValueError(f"baseline = {self.baseline!r} compares responses to one query: samples = 2 or more")
        if self.train_layers and self.lora_rank:
            raise ValueError("name either `train_layers` or `lora_rank`")
        if self.value_clip and self.baseline in ("group", "leave_one_out"):
            raise ValueError(f"value_clip needs values, and baseline = {self.baseline!r} has none")
        if self.gold == "verdict" and not self.grade:
            raise ValueError('gold = "verdict" needs a checker: name it under `grade`')
        if self.gold and not self.held_out:
            raise ValueError("gold is measured on held-out queries, and held_out is 0")
        if self.log and self.max_kl:
            raise ValueError("max_kl needs responses of the policy itself: those of a log tell no KL; leave it out")
        if not self.kl_coef and self.on_exceed != "stop":
            raise ValueError(f'on_exceed = "{self.on_exceed}" raises kl_coef, and that is 0: give it a value')
        return self

    @model_validator(mode="after")
    def _refit(self) -> Online:
        if bool(self.refit_reward_every) != bool(self.refit_log):
            raise ValueError(
                "refit_reward_every and refit_log go together: the old verdicts are mixed with the new ones"
            )
        if self.refit_reward_every and not self.grade:
            raise ValueError("refit_reward_every needs verdicts of new responses: name a checker under `grade`")
        if self.refit_reward_every and (self.reward in ("verdict", "score") or ":" in self.reward):
            raise ValueError("refit_reward_every needs the folder of a reward model under `reward`")
        if self.log and self.refit_reward_every:
            raise ValueError("a log has no new responses to fit a reward model to: leave refit_reward_every out")
        return self

    def _check_iterations(self) -> None:
        """Let a log have several iterations: each learns from another part of it."""


class Apa(Online):
    """Advantage-induced policy alignment (Zhu et al. 2023, 2306.02231).

    Attributes:
        kl_coef: λ: the smaller, the farther the policy goes; 0.1 is the paper's, which has it count standard deviations
            of the advantages (`whiten`).
        anchor: What log π is drawn to Adv/λ away from: the initial policy (the paper), or the one that drew ("old").
    """

    method: ClassVar[str] = "apa"
    anchor: Literal["initial", "old"] = "initial"


class Awr(Online):
    """Advantage-weighted regression (Peng et al. 2019) with capped weights.

    Attributes:
        kl_coef: λ; 1 is the paper's (2306.02231), where 0.1 exploded.
        max_weight: The largest weight exp(Adv/λ).
    """

    method: ClassVar[str] = "awr"
    kl_coef: float = Field(1.0, gt=0, allow_inf_nan=False)
    max_weight: float = Field(20.0, gt=1, allow_inf_nan=False)


class Ppo(Online):
    """Proximal policy optimisation (Schulman et al. 2017) with a KL penalty in the reward (Ziegler et al. 2019).

    Attributes:
        clip_range: ε of the ratio.
        value_clip: ε of the values.
        kl_coef: β at first.
        kl_controller: "adaptive" steers β to `kl_target`, "fixed" leaves it.
        kl_target: KL of a response that is aimed at, in nats.
        kl_horizon: Responses over which β may change by about a fifth.
    """

    method: ClassVar[str] = "ppo"
    rollouts: int = Field(128, ge=2)
    epochs: int = Field(4, ge=1)
    clip_range: float = Field(0.2, gt=0, lt=1)
    value_clip: float | None = Field(0.2, gt=0, allow_inf_nan=False)
    kl_coef: float = Field(0.05, ge=0, allow_inf_nan=False)
    kl_controller: Literal["adaptive", "fixed"] = "adaptive"
    kl_target: float = Field(6.0, gt=0, allow_inf_nan=False)
    kl_horizon: float = Field(10000.0, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _own_responses(self) -> Ppo:
        if self.log:
            raise ValueError(
                "ppo needs responses of the policy itself: name `queries`; apa and awr can learn from a log"
            )
        return self
