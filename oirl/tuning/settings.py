"""What a run of `oirl tune` is told, checked before anything is loaded: supervised methods, and what all share."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator


class Settings(BaseModel):
    """What all methods share.

    Attributes:
        model: The language model to tune: a folder, or a name on the hub.
        out: The run's folder.
        log: Logs to learn from.
        queries: File of queries to sample responses to, instead of a log.
        prompt: Template under which these are asked, and validation queries too.
        grade: Checker of sampled responses: numeric, exact, choice, math, or package.module:function.
        held_out: Share of the queries that nothing is learned from; they validate. 0 for none.
        validation_queries: The most of them to sample responses to.
        validation_temperature: 0 takes the likeliest tokens.
        max_tokens: The most tokens of a sampled response.
        max_length: The most tokens of prompt and response; longer examples are left out. By default what the model
            allows.
        epochs: Passes over what an iteration learns from.
        batch: Examples of an update, over all devices.
        micro_batch: Examples in the memory of a device at a time.
        learning_rate: Of AdamW, at its highest.
        schedule: How it goes on after the warm-up, in each iteration anew.
        warmup: Share of an iteration's updates.
        weight_decay: Of AdamW.
        max_grad_norm: Gradients are scaled down to this norm.
        lora_rank: Rank of adapters on all linear layers (LoRA); 0 trains all weights.
        lora_alpha: Their scale; twice the rank when null.
        bf16: Whether to compute in bfloat16; by default on GPUs that can.
        gradient_checkpointing: Recompute activations instead of keeping them.
        seed: For all chance.
        keep: Which weights become `model`: of the best validation, or the last.
        report_to: Where metrics go besides `metrics.jsonl`: tensorboard, wandb, trackio, mlflow, ….
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)

    method: ClassVar[str]
    model: str
    out: str
    log: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    queries: str | None = None
    prompt: str = "{query}"
    grade: str | None = None
    held_out: float = Field(0.1, ge=0, lt=1)
    validation_queries: int = Field(200, ge=1)
    validation_temperature: float = Field(0.0, ge=0, allow_inf_nan=False)
    max_tokens: int = Field(512, ge=1)
    max_length: int | None = Field(None, ge=2)
    epochs: int = Field(1, ge=1)
    batch: int = Field(32, ge=1)
    micro_batch: int = Field(8, ge=1)
    learning_rate: float = Field(2e-5, gt=0, allow_inf_nan=False)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = Field(0.05, ge=0, le=1)
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    max_grad_norm: float = Field(1.0, gt=0)
    lora_rank: int = Field(0, ge=0)
    lora_alpha: float | None = Field(None, gt=0, allow_inf_nan=False)
    bf16: bool | None = None
    gradient_checkpointing: bool = False
    seed: int = Field(0, ge=0, lt=2**31)
    keep: Literal["best", "last"] = "best"
    report_to: tuple[str, ...] = ()

    @field_validator("log", "report_to", "refit_log", mode="before", check_fields=False)
    @classmethod
    def _several(cls, value: Any) -> Any:
        found = (value,) if isinstance(value, str) else value
        return () if found in (("none",), ["none"], None) else found

    @field_validator("*", mode="before")
    @classmethod
    def _no_flag_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and kind in (int, float, int | None, float | None):
            raise ValueError("a number is needed")
        return value

    @model_validator(mode="after")
    def _fit(self) -> Settings:
        if self.batch % self.micro_batch:
            raise ValueError(f"batch = {self.batch} is no multiple of micro_batch = {self.micro_batch}")
        if bool(self.log) == bool(self.queries):
            raise ValueError("name either `log`, to learn from what is there, or `queries`, to sample responses")
        return self


class SupervisedUpdates(Settings):
    """What methods share that learn by supervised updates.

    Attributes:
        updates: Updates of an iteration, instead of whole epochs.
        log_every: Updates between lines of metrics.
        save_every: Updates between checkpoints; a multiple of `log_every`.
        evaluate_every: Updates between validations; by default the end of each epoch, with `updates` of each iteration.
    """

    updates: int | None = Field(None, ge=1)
    log_every: int = Field(10, ge=1)
    save_every: int = Field(100, ge=1)
    evaluate_every: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _steps(self) -> SupervisedUpdates:
        if self.save_every % self.log_every:
            raise ValueError(f"save_every = {self.save_every} is no multiple of log_every = {self.log_every}")
        if self.updates and "epochs" in self.model_fields_set:
            raise ValueError("name either `epochs` or `updates`")
        return self


class FromLog(SupervisedUpdates):
    """`sft` and `filter`: what they learn from is in the log."""

    @model_validator(mode="after")
    def _needs_log(self) -> FromLog:
        if not self.log:
            raise ValueError(f"{self.method} learns from a log: name it under `log`")
        return self


class Sft(FromLog):
    """Behaviour cloning of all responses."""

    method: ClassVar[str] = "sft"


class Filter(FromLog):
    """Behaviour cloning of right responses: filtered SFT, or "final-answer RL"."""

    method: ClassVar[str] = "filter"


class Sampled(Settings):
    """What methods share that sample responses.

    Attributes:
        iterations: Rounds of sampling and learning; 1 with a log.
        samples: Responses to each query in each iteration.
        temperature: At which they are drawn.
        engine: What draws them: `transformers` shares the weights that are trained; `vllm` gets them sent.
        engine_params: The engine's parameters; `model` among them is what a server calls the model.
        reward: "verdict" (1 right, 0 wrong), "score" (the log's column), the folder of a reward model of responses by
            `oirl fit`, package.module:function of TRL's form, f(prompts, completions, **columns) -> rewards, or the
            address of a server (http://…).
    """

    iterations: int = Field(1, ge=1)
    samples: int = Field(8, ge=1)
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)
    engine: str = "transformers"
    engine_params: dict[str, Any] = Field(default_factory=dict)
    reward: str = "verdict"

    @model_validator(mode="after")
    def _sources(self) -> Sampled:
        self._check_iterations()
        if self.queries and self.reward == "score":
            raise ValueError('reward = "score" is a column of a log; sampled responses have none')
        if self.queries and self.reward == "verdict" and not self.grade and self._needs_reward():
            raise ValueError('reward = "verdict" needs a checker of sampled responses: name it under `grade`')
        return self

    def _needs_reward(self) -> bool:
        return True

    def _check_iterations(self) -> None:
        if self.log and self.iterations != 1:
            raise ValueError(
                f"iterations = {self.iterations}: a log is the same each time; name `queries` to sample anew"
            )


class Raft(Sampled, SupervisedUpdates):
    """RAFT (Dong et al. 2023, 2304.06767): sample, keep what is rewarded best, imitate it, repeat.

    Attributes:
        select: "best_per_query", or "top_fraction" of all distinct responses.
        top_fraction: That fraction.
        min_reward: What has a lower reward is not learned from; of verdicts without kl_coef by default 1, else none.
        kl_coef: η in r − η · (log π − log π_ref), with the initial model as reference; 0 for none.
    """

    method: ClassVar[str] = "raft"
    temperature: float = Field(0.85, gt=0, allow_inf_nan=False)
    select: Literal["best_per_query", "top_fraction"] = "best_per_query"
    top_fraction: float = Field(0.125, gt=0, le=1)
    min_reward: float | None = Field(None, allow_inf_nan=False)
    kl_coef: float = Field(0.0, ge=0, allow_inf_nan=False)

    @property
    def least_reward(self) -> float | None:
        """The lowest reward that is learned from."""
        return 1.0 if self.min_reward is None and self.reward == "verdict" and not self.kl_coef else self.min_reward

    @model_validator(mode="after")
    def _kl(self) -> Raft:
        if self.kl_coef and self.log:
            raise ValueError("kl_coef needs responses of the policy itself, and those of a log are not; leave it at 0")
        return self


class Hir(Sampled, SupervisedUpdates):
    """HIR (Zhang et al. 2023, 2302.05206): sample, relabel in hindsight, learn from all of it, repeat.

    Attributes:
        relabel: `name`: correctness, ranks, length, format, or package.module:attribute; its other entries are its
            parameters. A function takes an `Outcome` and needs `instructions`, the one to ask for first.
        suboutputs: Further examples of each response, cut at uniformly drawn steps.
        contrastive: Which instructions an output is held against: none, all others of the relabelling ("opposite"), or
            those of the other rows of a micro-batch with their queries ("batch").
        contrastive_coef: α.
        entropy_coef: β.
        label_smoothing: ε of the supervised loss.
    """

    method: ClassVar[str] = "hir"
    relabel: dict[str, Any] = Field(default_factory=lambda: {"name": "correctness"})
    suboutputs: int = Field(0, ge=0)
    contrastive: Literal["none", "opposite", "batch"] = "opposite"
    contrastive_coef: float = Field(1.0, ge=0, allow_inf_nan=False)
    entropy_coef: float = Field(0.001, ge=0, allow_inf_nan=False)
    label_smoothing: float = Field(0.0, ge=0, lt=1)

    def _needs_reward(self) -> bool:
        return self.relabel.get("name") not in ("length", "format")

    @model_validator(mode="after")
    def _rows(self) -> Hir:
        if self.contrastive == "batch" and self.micro_batch < 2:
            raise ValueError(
                'contrastive = "batch" needs micro_batch = 2 or more: its rows are held against each other'
            )
        if self.queries and not self.grade and self.relabel.get("name") == "correctness":
            raise ValueError("relabel correctness needs verdicts of sampled responses: name a checker under `grade`")
        if not isinstance(self.relabel.get("name"), str):
            raise ValueError("relabel needs a `name`: correctness, ranks, length, format or package.module:attribute")
        return self
