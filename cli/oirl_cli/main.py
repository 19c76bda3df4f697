"""The command `oirl`: its groups of commands, and what becomes of errors."""

from __future__ import annotations

import signal
import sys
from typing import Annotated

import typer

from oirl import __version__
from oirl.errors import OirlError
from oirl_cli import audit, demo, known, logs, models

app = typer.Typer(
    help="Turn evaluation logs into better prompts: import, audit, split, fit, evaluate, select.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for module in (demo, logs, audit, models, known):
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
    """Turn evaluation logs into better prompts: import, audit, split, fit, evaluate, select."""


def run() -> None:
    """Run the command line: exit 0 when done, 2 on a user's error (one line on stderr), 1 on a bug."""
    if hasattr(signal, "SIGPIPE"):
        # `| head` ends the process quietly, as it ends any other tool.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        code = typer.main.get_command(app).main(standalone_mode=False)
        sys.stdout.flush()
    except OirlError as e:
        _fail(str(e), 2)
    except MemoryError:
        _fail("there is not enough memory for this; read fewer or smaller files at a time", 2)
    except (KeyboardInterrupt, typer.Abort):
        _fail("stopped; files that were being written are left as they were before", 130)
    except Exception as e:
        if type(e).__name__ == "NoArgsIsHelpError":  # no command: the help is the message
            print(e.format_message())  # type: ignore[attr-defined]
            sys.exit(2)
        if hasattr(e, "format_message"):  # the command-line parser's own errors
            context = getattr(e, "ctx", None)
            command = context.command_path if context else "oirl"
            _fail(f"{e.format_message().rstrip('.')}; see `{command} --help`", 2)
        raise
    else:
        sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> None:
    print(f"oirl: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
