from __future__ import annotations

import pytest

from oirl.errors import ConfigError, MissingPackageError, OirlError, UnknownNameError
from oirl.registry import KINDS, load_attribute, names, resolve


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, found in KINDS.items() for n in found])
def test_every_registered_component_is_there(kind: str, name: str) -> None:
    component = resolve(kind, name)
    assert component is not None
    if kind == "formats":
        assert component.name == name
        assert component.record in {"interactions", "queries", "preferences"}
    if kind == "prompt-models":
        assert component.name == name


def test_an_unknown_name_lists_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'contrast'") as error:
        resolve("prompt-models", "contrst")
    assert all(name in str(error.value) for name in KINDS["prompt-models"])
    assert isinstance(error.value, LookupError)


def test_an_unknown_kind_lists_the_kinds() -> None:
    with pytest.raises(UnknownNameError, match="formats"):
        names("flavours")


def test_a_component_of_ones_own_is_named_by_its_path() -> None:
    import json

    assert resolve("checkers", "json:dumps") is json.dumps


@pytest.mark.parametrize(
    ("path", "kind", "match"),
    [
        ("no_such_package_at_all:f", MissingPackageError, "no_such_package_at_all"),
        ("json:no_such_function", ConfigError, "no attribute"),
        ("json", ConfigError, "package.module:attribute"),
        (":f", ConfigError, "package.module:attribute"),
    ],
)
def test_a_path_that_leads_nowhere_says_so(path: str, kind: type[OirlError], match: str) -> None:
    with pytest.raises(kind, match=match):
        load_attribute(path)


def test_third_parties_add_through_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    import oirl.registry

    entry = EntryPoint("shout", "json:dumps", "oirl.checkers")
    monkeypatch.setattr(oirl.registry, "entry_points", lambda group: [entry] if group == "oirl.checkers" else [])
    import json

    assert resolve("checkers", "shout") is json.dumps
    assert "shout" not in names("formats")


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        ("DataError", ValueError),
        ("ConfigError", ValueError),
        ("NotFoundError", FileNotFoundError),
        ("UnknownNameError", LookupError),
        ("NotFittedError", ValueError),
        ("ModelFileError", ValueError),
        ("MissingPackageError", ImportError),
    ],
)
def test_errors_inherit_the_builtin_they_stand_for(error: str, builtin: type[Exception]) -> None:
    import oirl.errors

    kind = getattr(oirl.errors, error)
    assert issubclass(kind, builtin)
    assert issubclass(kind, OirlError)
    assert str(kind("one line")) == "one line"
