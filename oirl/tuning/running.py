"""`oirl.tune`: a run of any method, from its settings to its report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from oirl.errors import ConfigError
from oirl.tuning.base_run import TuningRun
from oirl.tuning.configuring import make_settings
from oirl.tuning.online_settings import Online
from oirl.tuning.report import TuneReport
from oirl.tuning.settings import Settings, SupervisedUpdates
from oirl.tuning.sources import Data


def tune(
    method: str,
    settings: Mapping[str, Any] | Settings,
    *,
    progress: Callable[[dict[str, Any]], None] = lambda _: None,
) -> TuneReport:
    """Improve a language model by supervised or online updates; a run that was stopped goes on where it was.

    Args:
        method: "sft", "filter", "raft", "hir", "apa", "ppo" or "awr".
        settings: As `oirl.tuning.settings` and `oirl.tuning.online_settings` say.
        progress: Called with each line of metrics.

    Raises:
        UnknownNameError: If there is no such method, reward, checker, engine or relabelling.
        ConfigError: If a setting is not allowed, or the model cannot be loaded.
        DataError: If there is nothing to learn from.
        EngineError: If an engine cannot go on.
        TrainingError: If the loss is not a number any more.
    """
    how = settings if isinstance(settings, Settings) else make_settings(method, settings)
    if how.method != method:
        raise ConfigError(f"the settings are of {how.method}, not of {method}")
    data = Data(how)
    run: TuningRun
    if isinstance(how, Online):
        from oirl.tuning.online import OnlineRun

        run = OnlineRun(how, data, progress)
    else:
        from oirl.tuning.supervised import SupervisedRun

        assert isinstance(how, SupervisedUpdates)
        run = SupervisedRun(how, data, progress)
    return run.go()
