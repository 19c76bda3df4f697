"""Texts to numbers without a model: hashed n-grams and what can be counted. Pure functions of texts and arrays.

N-grams are 64-bit hashes from the start, so that counting them is sorting integers, and a saved vocabulary holds no
text of the log.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from oirl.logs.text import text_hash

TOKEN = re.compile(r"\d[\d,]*(?:\.\d+)?|[^\W\d_]+|[$%?/.!]")
NUMBER_TOKEN = "0"
_SENTENCE_END = frozenset(".?!")
_NUMBER_WORDS = frozenset(
    "one two three four five six seven eight nine ten eleven twelve dozen hundred thousand".split()
)
CUES = tuple(
    "each every per more less fewer than total altogether all left remain remaining times twice half third quarter "
    "double percent % $ many much if then after before and or of day days week month year hour hours minutes average "
    "first rest only same both another spend cost sold gave buy bought older equal ratio / ? how".split()
)
N_COUNTS = 24 + len(CUES)
"""Countable features of a text."""
_CUE_POSITION = {cue: i for i, cue in enumerate(CUES)}
_MIX = np.uint64(0x9E3779B97F4A7C15)
_BIG = 1e12


@dataclass(frozen=True, slots=True)
class Grams:
    """Hashed n-grams of some documents.

    Attributes:
        hashes: All n-grams, document after document, uint64 (N,).
        ends: Where each document ends in `hashes`, int64 (D,).
    """

    hashes: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    def documents(self) -> np.ndarray:
        """Return the document of each n-gram, int64 (N,)."""
        return np.repeat(np.arange(len(self.ends)), np.diff(self.ends, prepend=0))


@dataclass(frozen=True, slots=True)
class Parsed:
    """One text, read once.

    Attributes:
        tokens: Words and marks in lower case, every number as `NUMBER_TOKEN`.
        last: Tokens of the last sentence, in which a problem asks its question.
        counts: Counts and sizes of numbers, lengths, then a count for each of `CUES`.
    """

    tokens: list[str]
    last: list[str]
    counts: list[float]


def parse(text: str) -> Parsed:
    """Read the tokens, the last sentence and the countable features of a text."""
    tokens: list[str] = []
    sentence: list[str] = []
    last: list[str] = []
    values: list[float] = []
    cues = [0.0] * len(CUES)
    ends = letters = 0
    for token in TOKEN.findall(text.lower()):
        if token[0].isdecimal():
            values.append(min(float(token.replace(",", "")), _BIG))
            token = NUMBER_TOKEN
        elif token in _CUE_POSITION:
            cues[_CUE_POSITION[token]] += 1
        if token in _SENTENCE_END:
            ends += 1
            last = sentence if len(sentence) > 1 else last
            sentence = []
            if token == "?":
                tokens.append(token)
                letters += 1
            continue
        letters += len(token)
        tokens.append(token)
        sentence.append(token)
    last = (sentence if len(sentence) > 1 else last) or tokens
    counts = _counts(tokens, values, len(last), max(ends, 1), letters, text.count(","))
    return Parsed(tokens, last, counts + [math.log1p(c) for c in cues])


def _counts(
    tokens: list[str], values: list[float], last: int, sentences: int, letters: int, commas: int
) -> list[float]:
    sizes = [math.log1p(v) for v in values] or [0.0]
    mean = sum(sizes) / len(sizes)
    n, k, distinct = max(len(tokens), 1), len(values), len(set(values))
    return [
        k,
        math.log1p(k),
        max(sizes),
        min(sizes),
        mean,
        sum(sizes),
        math.sqrt(sum((s - mean) ** 2 for s in sizes) / len(sizes)),
        sum(v >= 10 for v in values),
        sum(v >= 100 for v in values),
        sum(v >= 1000 for v in values),
        sum(v != int(v) for v in values),
        distinct,
        float(distinct < k),
        math.log1p(n),
        n / 100,
        sentences,
        n / sentences,
        commas,
        letters / n,
        sizes[-1] - sizes[0],
        float(k > 0 and values[0] >= values[-1]),
        sum(t in _NUMBER_WORDS for t in tokens),
        len(set(tokens)) / n,
        last,
    ]


def word_grams(documents: Sequence[Sequence[str]], longest: int = 3) -> Grams:
    """Return the hashed word n-grams of 1 to `longest` tokens."""
    known: dict[str, int] = {}
    flat = [known[t] if t in known else known.setdefault(t, text_hash(t)) for d in documents for t in d]
    sizes = np.array([len(d) for d in documents], dtype=np.int64)
    return _grams(np.array(flat, dtype=np.uint64), sizes, 1, longest)


def char_grams(documents: Sequence[Sequence[str]], shortest: int = 3, longest: int = 4) -> Grams:
    """Return the hashed character n-grams of the tokens, joined by spaces, the ends marked by spaces too."""
    texts = [f" {' '.join(d)} " for d in documents]
    codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    sizes = np.array([len(t) for t in texts], dtype=np.int64)
    return _grams((codes.astype(np.uint64) + np.uint64(7)) * _MIX, sizes, shortest, longest)


def _grams(units: np.ndarray, sizes: np.ndarray, shortest: int, longest: int) -> Grams:
    """Return the n-grams of runs of units: each hash mixes its units in order."""
    ends = np.cumsum(sizes)
    document = np.repeat(np.arange(len(sizes)), sizes)
    found, owner = [], []
    gram = np.zeros(len(units), dtype=np.uint64)
    for n in range(1, longest + 1):
        # gram[i] covers units[i : i + n]; those that would run over their document's end are left out.
        size = len(units) - n + 1
        if size <= 0:
            break
        gram = (gram[:size] ^ units[n - 1 :]) * _MIX
        gram ^= gram >> np.uint64(31)
        if n >= shortest:
            inside = np.arange(size) + n <= ends[document[:size]]
            found.append(gram[inside])
            owner.append(document[:size][inside])
    if not found:
        return Grams(np.zeros(0, dtype=np.uint64), np.zeros(len(sizes), dtype=np.int64))
    owners = np.concatenate(owner)
    order = np.argsort(owners, kind="stable")
    counts = np.bincount(owners, minlength=len(sizes))
    return Grams(np.concatenate(found)[order], np.cumsum(counts))
