"""Data sets of Hugging Face `datasets`: folders written by `save_to_disk`, and names on the hub."""

from __future__ import annotations

import json
from pathlib import Path

from oirl.errors import ConfigError, DataError, NotFoundError, require
from oirl.logs.store import first_line

PREFIX = "hf://"
_ALIASES = {"gsm8k": ("openai/gsm8k", "main"), "svamp": ("ChilleD/SVAMP", None)}


def saved_files(folder: Path) -> list[Path]:
    """Return the Arrow files of data sets that `save_to_disk` wrote into a folder, [] if it holds none.

    Raises:
        DataError: If a data set's list of files cannot be read, or leads out of its folder.
    """
    found: list[Path] = []
    for state in sorted(folder.rglob("state.json")):
        if not (state.parent / "dataset_info.json").is_file():
            continue
        try:
            names = [entry["filename"] for entry in json.loads(state.read_bytes())["_data_files"]]
        except (ValueError, KeyError, TypeError, OSError, RecursionError) as e:
            raise DataError(f"{state} is not the state of a saved data set: {first_line(e)}") from e
        for name in names:
            file = state.parent / str(name)
            try:
                inside, there = file.resolve().parent == state.parent.resolve(), file.is_file()
            except (OSError, ValueError) as e:
                raise DataError(f"{state}: {name!r:.80} is no name of a file") from e
            if not inside:
                raise DataError(f"{state}: the file {name!r} stands outside of the data set's folder")
            if not there:
                raise NotFoundError(f"{state}: the data set names the file {name!r}, but it is not there")
            found.append(file)
    return found


def hub_files(source: str) -> list[Path]:
    """Return the Arrow files of a data set of the hub, fetched into the cache of `datasets` if need be.

    Args:
        source: `hf://NAME`, with `/CONFIG` after a name of two parts, and `:SPLIT` for one split only; gsm8k and
            svamp are short for the problem sets of that name.

    Raises:
        MissingPackageError: If `datasets` is not installed.
        NotFoundError: If the data set cannot be fetched.
    """
    require("datasets", "data", "reading data sets of the hub")
    import datasets

    name, _, split = source.removeprefix(PREFIX).partition(":")
    if "[" in split or "+" in split:
        raise ConfigError(f"{source}: a split is named whole, such as :train; parts of one are not read")
    known, config = _ALIASES.get(name.lower(), (name, None))
    parts = known.split("/")
    if config is None and len(parts) == 3 and not Path(known).exists():
        known, config = "/".join(parts[:2]), parts[2]
    try:
        loaded = datasets.load_dataset(known, config, split=split or None)
    except Exception as e:  # the package raises errors of many libraries, all of which mean this
        raise NotFoundError(f"{source}: the data set cannot be loaded ({type(e).__name__}: {first_line(e)})") from e
    parts_of = loaded.values() if isinstance(loaded, dict) else [loaded]
    files = [Path(entry["filename"]) for part in parts_of for entry in part.cache_files]
    if not files:
        raise NotFoundError(f"{source}: the data set has no rows")
    return files
