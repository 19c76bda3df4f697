"""Mutations of valid files, in structure and in bytes, and the property that every import must keep."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pyarrow.parquet as pq
from samples import Sample, deep, digits, to_json

import oirl
from oirl.errors import OirlError

WRONG: list[Any] = [
    None, [], {}, [None], [[]], [{}], {"a": {"b": [1]}}, {"text": ["a"]}, True, False, 0, 1, -1, 0.5, 2**31, 2**63,
    10**400, -(10**400), 1e308, float("nan"), float("inf"), float("-inf"), "", " ", "x", "\ud800", "a\udfffb", "a\nb\r",
    "\0", "9" * 5000, "1e999", "-inf", "attachment://x", "{{x}}", "../x", "2024-13-45", "0001-01-01T00:00:00+23:59",
    "9999-12-31T23:59:59-23:59", deep(30), deep(300), deep(900), deep(960), deep(2000), digits(4000), digits(5000),
    ["a", 1, None], [1, [2, {"c": "d"}]], "x" * 70_000, "x" * 1_000_000,
]  # fmt: skip


class Violation(AssertionError):
    """An import that did what no import may do."""


def files_in(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


def check(source: Path, root: Path, format: str = "auto", *, one_line: bool = True) -> bool:
    """Import `source`, which stands somewhere in `root`, and say whether it was accepted.

    Raises:
        Violation: If the import raises anything but an `OirlError` of one line that names a file of the source, leaves
            files behind after an error, writes elsewhere, or counts rows wrongly.
    """
    out = root / "out" / "log.parquet"
    out.parent.mkdir(exist_ok=True)
    before = files_in(root)
    try:
        report = oirl.import_log(source, out, format=format)
    except OirlError as e:
        _check_message(str(e) if one_line else " ".join(str(e).split()), source)
        left = files_in(root) ^ before
        if left:
            raise Violation(f"after an error there is {sorted(left)}") from e
        return False
    except Exception as e:
        raise Violation(f"{type(e).__name__}: {str(e)[:300]}") from e
    try:
        _check_report(report, out, files_in(root) - before)
    finally:
        for name in files_in(root) - before:
            (root / name).unlink()
    return True


def _check_message(message: str, source: Path) -> None:
    if not message.strip() or "\n" in message or "\r" in message:
        raise Violation(f"a message that is not one line: {message[:300]!r}")
    names = [source.name, *(p.name for p in (source.iterdir() if source.is_dir() else source.parent.iterdir()))]
    if not any(name in message for name in names):
        raise Violation(f"a message that names no file: {message[:300]!r}")


def _check_report(report: Any, out: Path, made: set[str]) -> None:
    if report.rows_read != report.rows_kept + report.rows_refused:
        raise Violation(f"read {report.rows_read}, but kept {report.rows_kept} and refused {report.rows_refused}")
    table = pq.read_table(out)
    table.validate(full=True)
    if len(table) != report.rows_kept:
        raise Violation(f"{len(table)} rows written, {report.rows_kept} reported")
    rejected = out.parent / "log.rejected.jsonl"
    reasons = []
    if rejected.exists():
        reasons = [json.loads(x, parse_constant=_no_constant)["reason"] for x in rejected.read_text().splitlines()]
    if len(reasons) != report.rows_refused or not all(reasons):
        raise Violation(f"{report.rows_refused} rows refused, {len(reasons)} written with reasons")
    if made - {f"out/{out.name}", f"out/{rejected.name}"}:
        raise Violation(f"wrote {sorted(made)}")
    if sum(r["count"] for r in report.reasons) != report.rows_refused:
        raise Violation("the reasons do not add up")


def _no_constant(name: str) -> Any:
    raise Violation(f"the rejected file holds {name}, which is no JSON")


# Structure


def mutate(sample: Sample, random: Random) -> dict[str, bytes]:
    """Return the files of a sample (its own under ""), with a few things wrong."""
    pieces = copy.deepcopy(sample.pieces())
    others = {name: value() for name, value in sample.beside.items()}
    for _ in range(random.choice([1, 1, 1, 2, 3, 5])):
        if others and random.random() < 0.25:
            name = random.choice(list(others))
            holder = [others[name]]
            _mutate_inside(holder, random)
            others[name] = holder[0] if holder else None
        else:
            _mutate_pieces(pieces, random)
    found = {"": sample.write(pieces), **{name: to_json(value).encode() for name, value in others.items()}}
    if random.random() < 0.05 and others:
        found[random.choice(list(others))] = random.choice([b"", b"{", b"\xff\xfe", b"[]", b"null"])
    return found


def _mutate_pieces(pieces: list[Any], random: Random) -> None:
    kind = random.random()
    if kind < 0.75 or not pieces:
        _mutate_inside(pieces, random)
    elif kind < 0.8:
        random.shuffle(pieces)
    elif kind < 0.87:
        pieces.insert(random.randrange(len(pieces) + 1), copy.deepcopy(random.choice(pieces)))
    elif kind < 0.92:
        pieces.insert(random.randrange(len(pieces) + 1), random.choice(WRONG))
    elif kind < 0.96:
        del pieces[random.randrange(len(pieces))]
    else:
        one, other = random.choice(pieces), random.choice(pieces)
        if isinstance(one, dict) and isinstance(other, dict):
            one.update(copy.deepcopy({k: v for k, v in other.items() if random.random() < 0.5}))


def _mutate_inside(holder: list[Any], random: Random) -> None:
    places = list(_places(holder))
    if not places:
        holder.append(random.choice(WRONG))
        return
    container, key = random.choice(places)
    value = container[key]
    kind = random.random()
    if kind < 0.55:
        container[key] = copy.deepcopy(random.choice(WRONG))
    elif kind < 0.65:
        del container[key]
    elif kind < 0.72:
        container[key] = random.choice([[value], {"value": value}, str(value), [value, value], {"text": value}])
    elif kind < 0.82 and isinstance(container, dict):
        container[random.choice([str(key).upper(), f"{key}.x", "\ud800", "a\nb", "", "query", "x" * 5000])] = value
        del container[key]
    elif kind < 0.9 and isinstance(container, dict):
        container[random.choice(["extra", "correct", "query", "prompt", "0", "a.b", "__proto__"])] = random.choice(
            WRONG
        )
    elif isinstance(container, list):
        container.extend(copy.deepcopy(random.choices(container, k=random.choice([1, 2, 30]))))
    else:
        other_container, other_key = random.choice(places)
        container[key] = copy.deepcopy(other_container[other_key])


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from _places(value[key])


# Bytes


def damage(data: bytes, random: Random) -> bytes:
    """Return bytes that are cut, flipped, repeated, encoded or wrapped in another way."""
    kind = random.randrange(12)
    a, b = sorted((random.randrange(len(data) + 1), random.randrange(len(data) + 1)))
    if kind <= 1:
        return data[:a]
    if kind <= 4:
        flipped = bytearray(data)
        for _ in range(random.choice([1, 1, 2, 8, 40])):
            flipped[random.randrange(len(flipped))] = random.choice([random.randrange(256), 0, 255, 34, 10, 123])
        return bytes(flipped)
    if kind == 5:
        return data[:a] + data[b:]
    if kind == 6:
        return data[:b] + data[a:]
    if kind == 7:
        return data[:a] + random.randbytes(random.choice([1, 4, 64])) + data[a:]
    if kind == 8:
        return random.choice(
            [b"\xef\xbb\xbf" + data, data.replace(b"\n", b"\r\n"), data.replace(b"\n", b"\r"), data * 2]
        )
    if kind == 9:
        return random.choice([b"", b"\n", b" " * 500, b"\n" * 500, b"\0" * 500, b"\n \n" + data, data + b"\n\n \n"])
    if kind == 10:
        text = data.decode("utf-8", "replace")
        return text.encode(random.choice(["utf-16", "utf-16-le", "utf-32", "utf-7"]))
    return data[: len(data) // 2] + data[a:b] + data[len(data) // 2 :]


def case(sample: Sample, seed: int) -> tuple[dict[str, bytes], str]:
    """Return the files of one mutated sample, and the format to name for it."""
    random = Random(seed)
    mode = random.random()
    files = mutate(sample, random) if mode < 0.6 else {"": damage(sample.write(sample.pieces()), random)}
    if mode > 0.55 and mode < 0.6:
        files[""] = damage(files[""], random) if files[""] else b""
    return files, random.choice(["auto", sample.format, sample.format])
