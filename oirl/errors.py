"""The errors that oirl raises: each says what, where, what is allowed and what to do, in one line.

Every kind also inherits the builtin that it stands for, so that `except ValueError` keeps working.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class OirlError(Exception):
    """Base of all errors that a user can cause and mend; the command line exits with 2 on it."""

    def __init__(self, *args: object) -> None:
        # Names from files may hold line breaks; a message is one line.
        super().__init__(*(" ".join(str(arg).split()) for arg in args))


class DataError(OirlError, ValueError):
    """The content of a log, a file or a table is not what it must be."""


class ConfigError(OirlError, ValueError):
    """A parameter, an option or a combination of them is not allowed."""


class NotFoundError(OirlError, FileNotFoundError):
    """A file or folder that was named is not there."""

    def __str__(self) -> str:
        """Return the message alone, as `OSError` would otherwise format its arguments."""
        return str(self.args[0]) if self.args else ""


class WriteError(OirlError, OSError):
    """A file or folder cannot be written: no room, no permission, a name that the disk refuses."""

    def __str__(self) -> str:
        """Return the message alone, as `OSError` would otherwise format its arguments."""
        return str(self.args[0]) if self.args else ""


class UnknownNameError(OirlError, LookupError):
    """A name is not registered; the message lists those that are."""


class NotFittedError(OirlError, ValueError, AttributeError):
    """A model was asked to predict before it was fitted or loaded."""


class ModelFileError(OirlError, ValueError):
    """A saved model is damaged, of another version, or not ours; nothing of it was loaded."""


class MissingPackageError(OirlError, ImportError):
    """An optional package is needed; the message holds the command that installs it."""


class TrainingError(OirlError, RuntimeError):
    """A training cannot go on: a loss, a gradient or a reward is not a number any more."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ' (did you mean 'x'?)' for the known name closest to `name`, or an empty string."""
    found = get_close_matches(name, list(known), n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""


def require(module: str, extra: str, purpose: str) -> None:
    """Raise a `MissingPackageError` naming the extra unless `module` can be imported.

    Args:
        module: The module to look for; it is located, not imported.
        extra: The optional dependency group of oirl that brings it.
        purpose: What it is needed for, as the subject of the sentence.

    Raises:
        MissingPackageError: If the module is not installed.
    """
    from importlib.util import find_spec

    if find_spec(module) is None:
        raise MissingPackageError(
            f"{purpose} needs the package {module!r}, which is not installed: pip install 'oirl[{extra}]'"
        )
