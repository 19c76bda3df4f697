"""The command demo (written next)."""
import typer


def register(app: typer.Typer) -> None:
    pass
