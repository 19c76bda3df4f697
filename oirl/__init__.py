"""oirl turns evaluation logs into better prompts and better language models.

The public names are loaded when they are first used, so that `import oirl` stays fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "BradleyTerryRewardModel": "oirl.rewards.preferences",
    "LanguageModelRewardModel": "oirl.rewards.language_model",
    "OirlError": "oirl.errors",
    "PromptRewardModel": "oirl.rewards.prompts",
    "PromptSelector": "oirl.selection.selector",
    "RewardFunction": "oirl.selection.ranking",
    "ResponseRewardModel": "oirl.rewards.responses",
    "Sampling": "oirl.engines.base",
    "audit": "oirl.evaluation.audit",
    "collect": "oirl.engines.collecting",
    "evaluate": "oirl.evaluation.evaluate",
    "evaluate_preferences": "oirl.evaluation.preferences",
    "evaluate_responses": "oirl.evaluation.responses",
    "export_log": "oirl.logs.exporting.pipeline",
    "import_log": "oirl.logs.importing.pipeline",
    "load": "oirl.rewards.saving",
    "make_pairs": "oirl.logs.pairs",
    "open_engine": "oirl.engines.opening",
    "rank": "oirl.selection.ranking",
    "read_log": "oirl.logs.store",
    "read_pairs": "oirl.logs.pairs",
    "split": "oirl.logs.splits",
    "tune": "oirl.tuning.running",
    "write_log": "oirl.logs.store",
}

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from oirl.engines.base import Sampling as Sampling
    from oirl.engines.collecting import collect as collect
    from oirl.engines.opening import open_engine as open_engine
    from oirl.errors import OirlError as OirlError
    from oirl.evaluation.audit import audit as audit
    from oirl.evaluation.evaluate import evaluate as evaluate
    from oirl.evaluation.preferences import evaluate_preferences as evaluate_preferences
    from oirl.evaluation.responses import evaluate_responses as evaluate_responses
    from oirl.logs.exporting.pipeline import export_log as export_log
    from oirl.logs.importing.pipeline import import_log as import_log
    from oirl.logs.pairs import make_pairs as make_pairs
    from oirl.logs.pairs import read_pairs as read_pairs
    from oirl.logs.splits import split as split
    from oirl.logs.store import read_log as read_log
    from oirl.logs.store import write_log as write_log
    from oirl.rewards.language_model import LanguageModelRewardModel as LanguageModelRewardModel
    from oirl.rewards.preferences import BradleyTerryRewardModel as BradleyTerryRewardModel
    from oirl.rewards.prompts import PromptRewardModel as PromptRewardModel
    from oirl.rewards.responses import ResponseRewardModel as ResponseRewardModel
    from oirl.rewards.saving import load as load
    from oirl.selection.ranking import RewardFunction as RewardFunction
    from oirl.selection.ranking import rank as rank
    from oirl.selection.selector import PromptSelector as PromptSelector
    from oirl.tuning.running import tune as tune


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'oirl' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
