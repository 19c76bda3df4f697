"""A reward model fitted anew while a policy is trained by it: new verdicts are mixed with the old ones."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from oirl.errors import ConfigError, DataError
from oirl.logs.store import read_log
from oirl.logs.text import normalise
from oirl.records import Query
from oirl.tuning.online_settings import Online
from oirl.tuning.scoring import open_reward_model

REFITTED = "response-reward-model"


def check_refit(how: Online, queries: Iterable[Query]) -> None:
    """Refuse, before anything is drawn, a reward model or a log that cannot be fitted to.

    Raises:
        ConfigError: If the model does not learn from verdicts.
        DataError: If a query of the log is another text than the query of that id which is to be asked.
    """
    kind = getattr(open_reward_model(how.reward), "kind", None)
    if kind != REFITTED:
        raise ConfigError(
            f"refit_reward_every fits a model to verdicts of responses (`oirl fit --target response`), and "
            f"{how.reward} is a {kind}"
        )

    texts = {q.query_id: normalise(q.query) for q in queries}
    log = read_log(list(how.refit_log), ["query_id", "query"])
    for name, text in zip(log["query_id"].to_pylist(), log["query"].to_pylist(), strict=True):
        if texts.get(name, normalise(text)) != normalise(text):
            raise DataError(
                f"the query {name!r} is one text in refit_log ({', '.join(how.refit_log)}) and another in "
                f"{how.queries}; give each text an id of its own"
            )


def refit_reward(how: Online, rollouts: Sequence[Path], held_out: Collection[str], out: Path) -> None:
    """Fit a new model like `how.reward` to the old log and to rollouts, and save it.

    Args:
        how: Names the model and the old log.
        rollouts: Folders of the rollouts so far.
        held_out: Ids of queries that the policy is measured on: nothing is learned from them here either.
        out: Where the new model goes.

    Raises:
        DataError: If there is nothing to learn from.
    """
    tables = [read_log(list(how.refit_log)), *(read_log(folder) for folder in rollouts)]
    log = pa.concat_tables(tables)
    log = log.filter(pc.invert(pc.is_in(log["query_id"], pa.array(sorted(held_out), pa.string()))))
    open_reward_model(how.reward).clone().fit(log).save(out)
