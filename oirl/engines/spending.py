"""What a collecting run has spent, and whether the next request may still be afforded."""

from __future__ import annotations

import re
from dataclasses import dataclass

from oirl.errors import ConfigError

TOO_SMALL = "the budget does not allow for a single request; raise it, or lower max_tokens"
_MILLION = 1e6
_FORM = re.compile(r"(\d[\d_]*(?:\.\d+)?)([kM]?)\s*(tokens|money)")
_SCALE = {"": 1.0, "k": 1e3, "M": 1e6}


@dataclass(frozen=True, slots=True)
class Budget:
    """The most to spend on a run, all its sessions together.

    Attributes:
        amount: In tokens (in and out), or in the currency of the price table.
        unit: "tokens" or "money".
    """

    amount: float
    unit: str

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Return the budget that a text names: `200000tokens`, `1.5Mtokens`, `2.50money`.

        Raises:
            ConfigError: If it has another form.
        """
        match = _FORM.fullmatch(text.strip())
        if match is None:
            raise ConfigError(
                f"budget {text!r}; allowed: a number and `tokens` or `money`, such as 500ktokens or 2.50money"
            )
        return cls(float(match[1].replace("_", "")) * _SCALE[match[2]], match[3])


class Spending:
    """Tokens and money, spent and promised.

    A request is promised at most: a token for each of its bytes, as many more as a chat template was seen to add, and
    `max_tokens`. So a budget is kept as long as the engine counts right; what a server charges for requests that it did
    not answer is not known.

    Args:
        budget: None for no limit.
        price: Of a million tokens in and out, None where it is not known.
        max_tokens: The most tokens of a response.

    Attributes:
        tokens_in: Tokens read by the model.
        tokens_out: Tokens sampled.

    Raises:
        ConfigError: If the budget is money and there is no price.
    """

    def __init__(self, budget: Budget | None, price: tuple[float, float] | None, max_tokens: int) -> None:
        if budget is not None and budget.unit == "money" and price is None:
            raise ConfigError("a budget in money needs the model's prices: --prices FILE with its name or `default`")
        self._budget, self._price, self._max_tokens = budget, price, max_tokens
        self.tokens_in = self.tokens_out = 0
        self._promised: dict[object, int] = {}
        self._untold_out = 0
        self._added = self._untold = 0

    @property
    def money(self) -> float | None:
        """What the tokens cost, None where the price is not known."""
        return self.cost(self.tokens_in, self.tokens_out)

    def cost(self, tokens_in: int | None, tokens_out: int | None) -> float | None:
        """Return the price of some tokens, None where it is not known."""
        if self._price is None or tokens_in is None or tokens_out is None:
            return None
        return (tokens_in * self._price[0] + tokens_out * self._price[1]) / _MILLION

    @property
    def limited(self) -> bool:
        """Whether there is a budget."""
        return self._budget is not None

    def promise(self, key: object, size: int) -> None:
        """Promise a request of `size` bytes that an earlier session has made already."""
        self._promised[key] = size

    def afford(self, key: object, size: int) -> bool:
        """Promise a request of `size` bytes, if the budget allows for it and for all that was promised before."""
        self.promise(key, size)
        if self._budget is None:
            return True
        tokens_in = self.tokens_in + sum(self._promised.values()) + self._added * len(self._promised)
        tokens_in += self._untold
        tokens_out = self.tokens_out + self._max_tokens * (len(self._promised) + self._untold_out)
        worst = tokens_in + tokens_out if self._budget.unit == "tokens" else self.cost(tokens_in, tokens_out)
        if worst is not None and worst <= self._budget.amount:
            return True
        del self._promised[key]
        return False

    def settle(self, key: object, tokens_in: int | None, tokens_out: int | None, *, answered: bool = True) -> None:
        """Replace what was promised by what it has been; of an answer whose tokens are not told the promise stays.

        Args:
            key: Of `afford`.
            tokens_in: Tokens read, None where it is not told.
            tokens_out: Tokens sampled, None where it is not told.
            answered: Whether there was a response to pay for.
        """
        size = self._promised.pop(key, 0)
        if answered and size:
            self._untold += size + self._added if tokens_in is None else 0
            self._untold_out += tokens_out is None
        if tokens_in and size:
            self._added = max(self._added, tokens_in - size)
        self.tokens_in += tokens_in or 0
        self.tokens_out += tokens_out or 0
