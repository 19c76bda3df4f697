"""Text as identity: normalising, masking numbers, and the ids that come from text. Pure functions."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from hashlib import blake2b

# One number: digits with thousands separators or a decimal part, as people write them in word problems.
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufffe\uffff]")
WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?|[^\w\s]")


def normalise(text: str) -> str:
    """Return `text` in Unicode NFKC, case-folded, with every run of white space as one space."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.casefold().split())


def mask_numbers(text: str) -> str:
    """Return the normalised text with every number replaced by `0`: what is left is the wording."""
    return NUMBER.sub("0", normalise(text))


def printable(text: str) -> str:
    """Return a text without characters that command a terminal or turn the order of what follows."""
    return _COMMANDS.sub("\ufffd", text)


def plain_json(text: str) -> str:
    """Return JSON in which what `printable` would replace is escaped, so that nothing is lost and no terminal obeys."""
    return _COMMANDS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def words(text: str) -> list[str]:
    """Return words and punctuation marks of a text, in order."""
    return WORD.findall(text)


@lru_cache(maxsize=1 << 16)
def text_id(text: str) -> str:
    """Return 16 hexadecimal digits that name the normalised text (64 bits of BLAKE2b)."""
    return blake2b(normalise(text).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def template_id(text: str) -> str:
    """Return 16 hexadecimal digits that name a text as it stands: in a prompt, line breaks and case matter."""
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def text_hash(text: str) -> int:
    """Return an unsigned 64-bit hash of a text as it stands."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def masked_hash(text: str) -> int:
    """Return an unsigned 64-bit hash of the wording of a text, equal for texts that differ in numbers only."""
    return text_hash(mask_numbers(text))
