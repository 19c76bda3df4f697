"""Run `python -m oirl_cli` where the command itself is not on the path."""

from oirl_cli.main import run

run()
