"""The command `oirl`: its groups of commands, and what becomes of errors."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from typing import Annotated, NoReturn

import typer

from oirl import __version__
from oirl.errors import OirlError
from oirl.logs.text import printable
from oirl_cli import audit, collecting, demo, fitting, known, logs, models, responses, tuning

_STOPPED = 130
_NO_OUTPUT = (errno.ENOSPC, errno.EIO, errno.EBADF)

app = typer.Typer(
    help="Turn evaluation logs into better prompts: import, audit, split, fit, evaluate, select, tune.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for module in (demo, logs, audit, fitting, models, responses, collecting, tuning, known):
    module.register(app)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"oirl {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Turn evaluation logs into better prompts: import, audit, split, fit, evaluate, select, tune."""


def run() -> None:
    """Run the command line: exit 0 done, 2 a user's error (one line on stderr), 1 a bug, 130 stopped."""
    if hasattr(signal, "SIGPIPE"):
        # `| head` ends the process quietly, as it ends any other tool.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if sys.stdout is None:  # closed by who called
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    try:
        code = typer.main.get_command(app).main(standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        code = _STOPPED
    except Exception as e:
        if type(e).__name__ == "NoArgsIsHelpError":  # no command: the help is the message
            print(e.format_message())  # type: ignore[attr-defined]
            sys.exit(2)
        message = _user_error(e)
        if message is None:
            raise
        _fail(message, 2)
    if code == _STOPPED:
        _fail("stopped; files that were being written are left as they were before", _STOPPED)
    sys.exit(code if isinstance(code, int) else 0)


def _user_error(e: Exception) -> str | None:
    """Return what to say of an error that is the user's or the machine's, None for a bug."""
    if isinstance(e, OirlError):
        return str(e)
    if isinstance(e, MemoryError):
        return "there is not enough memory for this; read fewer or smaller files at a time"
    if isinstance(e, OSError) and e.errno in _NO_OUTPUT:
        return f"the output cannot be written: {e.strerror}"
    if hasattr(e, "format_message"):  # the command-line parser's own errors
        context = getattr(e, "ctx", None)
        command = context.command_path if context else "oirl"
        return f"{e.format_message().rstrip('.')}; see `{command} --help`"
    return None


def _fail(message: str, code: int) -> NoReturn:
    print(f"oirl: {printable(' '.join(message.split()))}", file=sys.stderr)
    if sys.stdout is not None:
        # What could not be written must not be tried again when the process ends.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
