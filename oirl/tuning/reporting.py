"""Metrics to tensorboard, wandb, trackio and the like, through the callbacks of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from oirl.errors import ConfigError, MissingPackageError

_PREFIXES = {"update": "", "validation": "eval_", "rollouts": "rollouts_", "guard": "guard_"}


class Reporter:
    """Sends metrics under the updates of the whole run, where transformers' Trainer would begin anew each iteration.

    Args:
        names: As transformers calls them.
        out: The run's folder.

    Raises:
        ConfigError: If a name is not known.
        MissingPackageError: If its package is not installed.
    """

    def __init__(self, names: Sequence[str], out: Path) -> None:
        self._callbacks: list[Any] = []
        if not names:
            return
        from transformers import TrainerControl, TrainerState, TrainingArguments
        from transformers.integrations import get_reporting_integration_callbacks

        try:
            self._callbacks = [kind() for kind in get_reporting_integration_callbacks(list(names))]
        except ValueError as e:
            raise ConfigError(f"report_to = {list(names)!r}: {e}") from e
        except (RuntimeError, ImportError) as e:
            raise MissingPackageError(f"report_to = {list(names)!r}: {e}") from e
        self._arguments = TrainingArguments(output_dir=str(out), run_name=out.name, report_to="none")
        self._state, self._control = TrainerState(is_world_process_zero=True), TrainerControl()
        self._begun = False

    def tell(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """Send the numbers among some metrics, named as the Trainer names its own."""
        if not self._callbacks:
            return
        self._state.global_step = step
        prefix = _PREFIXES[kind]
        numbers = {f"{prefix}{k}": float(v) for k, v in values.items() if isinstance(v, (int, float))}
        for callback in self._callbacks:
            if not self._begun:
                callback.on_train_begin(self._arguments, self._state, self._control, model=None)
            callback.on_log(self._arguments, self._state, self._control, logs=dict(numbers))
        self._begun = True

    def close(self) -> None:
        """Send what is left."""
        for callback in self._callbacks:
            if self._begun:
                callback.on_train_end(self._arguments, self._state, self._control, model=None)
