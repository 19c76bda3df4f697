"""Names to components: what is known, where it lives, and how third parties add their own.

A component is loaded only when it is asked for, so that listing names stays cheap. Other packages add to a
kind through an entry point of the group `oirl.<kind>`, for example::

    [project.entry-points."oirl.formats"]
    my-format = "my_package.module:FORMAT"
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from inspect import signature
from typing import Any

from oirl.errors import ConfigError, MissingPackageError, UnknownNameError, nearest

KINDS: dict[str, dict[str, str]] = {
    "formats": {
        "gsm8k": "oirl.logs.importing.problems:GSM8K",
        "svamp": "oirl.logs.importing.problems:SVAMP",
        "lm-eval": "oirl.logs.importing.lm_eval:LM_EVAL",
        "inspect": "oirl.logs.importing.inspect_logs:INSPECT",
        "promptfoo": "oirl.logs.importing.promptfoo:PROMPTFOO",
        "openai-evals": "oirl.logs.importing.openai_evals:OPENAI_EVALS",
        "helm": "oirl.logs.importing.helm:HELM",
        "gepa": "oirl.logs.importing.candidates:GEPA",
        "hh-rlhf": "oirl.logs.importing.preferences:HH_RLHF",
        "rewardbench": "oirl.logs.importing.preferences:REWARDBENCH",
        "ultrafeedback": "oirl.logs.importing.preferences:ULTRAFEEDBACK",
        "trl": "oirl.logs.importing.preferences:TRL",
        "trl-unpaired": "oirl.logs.importing.preferences:TRL_UNPAIRED",
        "router": "oirl.logs.importing.router:ROUTER",
        "parquet": "oirl.logs.importing.tabular:PARQUET",
        "arrow": "oirl.logs.importing.tabular:ARROW",
        "jsonl": "oirl.logs.importing.tabular:JSONL",
        "csv": "oirl.logs.importing.tabular:CSV",
        "tsv": "oirl.logs.importing.tabular:TSV",
    },
    "exports": {
        "trl-preference": "oirl.logs.exporting.training:TRL_PREFERENCE",
        "trl-unpaired": "oirl.logs.exporting.training:TRL_UNPAIRED",
        "trl-sft": "oirl.logs.exporting.training:TRL_SFT",
        "lm-eval": "oirl.logs.exporting.tools:LM_EVAL",
        "promptfoo": "oirl.logs.exporting.tools:PROMPTFOO",
        "openai-finetune": "oirl.logs.exporting.training:OPENAI_FINETUNE",
        "jsonl": "oirl.logs.exporting.tables:JSONL",
        "csv": "oirl.logs.exporting.tables:CSV",
    },
    "checkers": {
        "numeric": "oirl.logs.checkers:numeric",
        "exact": "oirl.logs.checkers:exact",
        "choice": "oirl.logs.checkers:choice",
        "math": "oirl.logs.checkers:math",
    },
    "engines": {
        "transformers": "oirl.engines.transformers_engine:TransformersEngine",
        "vllm": "oirl.engines.vllm_engine:VLLMEngine",
        "openai": "oirl.engines.openai_engine:OpenAIEngine",
    },
    "embedders": {
        "tfidf": "oirl.rewards.embedders:TfidfEmbedder",
        "sentence-transformers": "oirl.rewards.embedders:SentenceEmbedder",
        "hidden-states": "oirl.rewards.hidden_states:HiddenStateEmbedder",
    },
    "prompt-models": {
        "contrast": "oirl.rewards.contrast:ContrastScorer",
        "logistic": "oirl.rewards.pointwise:LogisticScorer",
        "xgboost": "oirl.rewards.pointwise:XGBoostScorer",
        "xgboost-published": "oirl.rewards.pointwise:PublishedXGBoostScorer",
        "mlp": "oirl.rewards.pointwise:MLPScorer",
    },
    "response-models": {
        "linear": "oirl.rewards.learners:LinearLearner",
        "xgboost": "oirl.rewards.learners:BoostedLearner",
        "mlp": "oirl.rewards.learners:NetworkLearner",
    },
    "preference-models": {
        "linear": "oirl.rewards.learners:LinearLearner",
        "xgboost": "oirl.rewards.learners:BoostedLearner",
        "mlp": "oirl.rewards.learners:NetworkLearner",
        "classifier": "oirl.rewards.learners:ClassifierLearner",
    },
    "relabellings": {
        "correctness": "oirl.tuning.relabelling:Correctness",
        "ranks": "oirl.tuning.relabelling:Ranks",
        "length": "oirl.tuning.relabelling:Length",
        "format": "oirl.tuning.relabelling:Format",
    },
    "saved": {
        "prompt-reward-model": "oirl.rewards.prompts:PromptRewardModel",
        "prompt-selector": "oirl.selection.selector:PromptSelector",
        "response-reward-model": "oirl.rewards.responses:ResponseRewardModel",
        "preference-reward-model": "oirl.rewards.preferences:BradleyTerryRewardModel",
        "language-model-reward-model": "oirl.rewards.language_model:LanguageModelRewardModel",
    },
}
"""Kind -> name -> "module:attribute" of the components that come with oirl. Format sniffers are asked in this order."""


def names(kind: str) -> dict[str, str]:
    """Return name -> "module:attribute" for one kind, third parties' entries after oirl's own.

    Raises:
        UnknownNameError: If the kind itself is not known.
    """
    if kind not in KINDS:
        raise UnknownNameError(f"unknown kind of component {kind!r}; known: {', '.join(KINDS)}")
    found = dict(KINDS[kind])
    for entry in entry_points(group=f"oirl.{kind}"):
        found.setdefault(entry.name, entry.value)
    return found


def resolve(kind: str, name: str) -> Any:
    """Return the component registered under `name`.

    Args:
        kind: A key of `KINDS`, such as "formats" or "checkers".
        name: A registered name, or `package.module:attribute` for a component of your own.

    Raises:
        UnknownNameError: If the name is not registered; the message lists the known ones.
    """
    known = names(kind)
    if name in known:
        return load_attribute(known[name])
    if ":" in name:
        return load_attribute(name)
    raise UnknownNameError(
        f"unknown {kind[:-1]} {name!r}{nearest(name, known)}; known: {', '.join(known)}, or package.module:attribute"
    )


def create(kind: str, name: str, params: Mapping[str, Any] | None) -> Any:
    """Return the component registered under `name`, made with some parameters.

    Raises:
        UnknownNameError: If the name is not registered.
        ConfigError: If it has no parameter of a name; the message lists those it has.
    """
    factory = resolve(kind, name)
    given = dict(params or {})
    known = list(signature(factory).parameters)
    for parameter in given:
        if parameter not in known:
            allowed = ", ".join(known) or "none"
            raise ConfigError(
                f"the {kind[:-1]} {name!r} has no parameter {parameter!r}{nearest(parameter, known)}; it has: {allowed}"
            )
    return factory(**given)


def load_attribute(path: str) -> Any:
    """Import `package.module:attribute` and return the attribute.

    Raises:
        ConfigError: If the path has no colon, or the module has no such attribute.
        MissingPackageError: If the module cannot be imported.
    """
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise ConfigError(f"{path!r} is not of the form package.module:attribute")
    try:
        module = import_module(module_name)
    except (ModuleNotFoundError, TypeError) as e:
        raise MissingPackageError(
            f"cannot import {module_name!r} for {path!r}: {e}; is it installed or on PYTHONPATH?"
        ) from e
    try:
        return getattr(module, attribute)
    except AttributeError as e:
        raise ConfigError(f"module {module_name!r} has no attribute {attribute!r}") from e
