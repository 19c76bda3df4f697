"""Values of any type to the type of a column, each refused with a reason where that would be a guess."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from oirl.logs.importing.base import Values

JSON_COLUMNS = frozenset({"metadata", "sampling"})
_TRUE = frozenset({"true", "yes", "1", "1.0", "correct", "right", "pass", "passed"})
_FALSE = frozenset({"false", "no", "0", "0.0", "incorrect", "wrong", "fail", "failed"})
_EMPTY = frozenset({"", "null", "none"})


def coerce(field: pa.Field, values: Values) -> tuple[pa.Array, dict[int, str]]:
    """Convert one column.

    Args:
        field: The column of the record.
        values: What the file holds.

    Returns:
        The converted array, null where a value was refused, and index -> reason for those.
    """
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    if isinstance(values, pa.Array):
        if values.type == field.type:
            return values, _not_finite(field, values)
        if pa.types.is_null(values.type):
            return pa.nulls(len(values), field.type), {}
        if pa.types.is_large_string(values.type) and pa.types.is_string(field.type):
            return values.cast(field.type), {}
        return _coerce_distinct(field, _plain(values))
    return _coerce_list(field, values)


def _plain(values: pa.Array) -> pa.Array:
    """Return values of a type that all of Arrow's functions know, and whose Python values need no pandas."""
    if isinstance(values, pa.ExtensionArray):
        values = values.storage
    if pa.types.is_timestamp(values.type) and values.type.unit == "ns":
        return pc.cast(values, pa.timestamp("us", tz=values.type.tz), safe=False)
    return values


def _coerce_distinct(field: pa.Field, values: pa.Array) -> tuple[pa.Array, dict[int, str]]:
    # Converting each distinct value once keeps columns such as `correct` fast whatever their type is.
    if pa.types.is_nested(values.type):
        return _coerce_list(field, _python_values(values))
    if values.type == field.type:
        return values, _not_finite(field, values)
    try:
        encoded = values if pa.types.is_dictionary(values.type) else values.dictionary_encode()
    except pa.ArrowNotImplementedError:  # which types have it depends on the version of Arrow
        return _coerce_list(field, _python_values(values))
    converted, bad = _coerce_list(field, _python_values(encoded.dictionary))
    if bad:
        codes = encoded.indices.to_pylist()
        reasons = {i: bad[code] for i, code in enumerate(codes) if code in bad}
    else:
        reasons = {}
    return converted.take(encoded.indices), reasons


class _Unreadable:
    """A value that Python's types cannot hold, such as a time of the year 40,000,000."""

    def __repr__(self) -> str:
        return "out of range"


def _python_values(values: pa.Array) -> list[Any]:
    try:
        return values.to_pylist()
    except (ValueError, OverflowError, KeyError, pa.ArrowException):
        return [_python_value(values, i) for i in range(len(values))]


def _python_value(values: pa.Array, i: int) -> Any:
    try:
        return values[i].as_py()
    except (ValueError, OverflowError, KeyError, pa.ArrowException):
        return _Unreadable()


def _coerce_list(field: pa.Field, values: list[Any]) -> tuple[pa.Array, dict[int, str]]:
    convert = _converter(field)
    out: list[Any] = []
    reasons: dict[int, str] = {}
    for i, value in enumerate(values):
        try:
            if isinstance(value, Decimal):
                value = int(value) if value == value.to_integral_value() else float(value)
            out.append(None if value is None else convert(value))
        except (ValueError, TypeError, OverflowError, RecursionError, ArithmeticError) as e:
            out.append(None)
            reasons[i] = f"{field.name} is {_show(value)}: {e}"
    return pa.array(out, field.type), reasons


def _converter(field: pa.Field) -> Callable[[Any], Any]:
    if field.name in JSON_COLUMNS:
        return _to_json
    if pa.types.is_boolean(field.type):
        return _to_bool
    if pa.types.is_floating(field.type):
        return _to_float
    if pa.types.is_integer(field.type):
        return _to_int32
    if pa.types.is_timestamp(field.type):
        return _to_time
    return _to_text


def _to_text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("text is needed")
    if isinstance(value, (str, int, float)):
        return _valid_text(str(value))
    raise TypeError("text is needed, not a list or an object")


def _valid_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ValueError("not valid Unicode (half of a surrogate pair)") from e
    return text


def _to_bool(value: Any) -> bool | None:
    if isinstance(value, bool):
        return value
    if isinstance(value, (int, float)) and value in (0, 1):
        return bool(value)
    if isinstance(value, str):
        word = value.strip().lower()
        if word in _TRUE or word in _FALSE:
            return word in _TRUE
        if word in _EMPTY:
            return None
    raise ValueError("allowed are true, false, 1, 0, yes, no, correct, wrong, pass, fail, or empty (not known)")


def _to_float(value: Any) -> float | None:
    if isinstance(value, str) and value.strip().lower() in _EMPTY:
        return None
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        try:
            number = float(value)
        except ValueError as e:
            raise ValueError("a number is needed") from e
        if math.isfinite(number):
            return number
    raise ValueError("a finite number is needed")


def _to_int32(value: Any) -> int | None:
    number = _to_float(value)
    if number is None:
        return None
    if number != int(number) or not -(2**31) <= number < 2**31:
        raise ValueError("a whole number is needed")
    return int(number)


def _to_time(value: Any) -> datetime | None:
    if isinstance(value, str):
        if value.strip().lower() in _EMPTY:
            return None
        try:
            # `Z` is read by fromisoformat from Python 3.11 on only.
            value = datetime.fromisoformat(value.strip().replace("Z", "+00:00"))
        except ValueError as e:
            raise ValueError("a time such as 2024-05-31T12:00:00Z is needed") from e
    if isinstance(value, datetime):
        return value if value.tzinfo else value.replace(tzinfo=timezone.utc)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e11:
        return datetime.fromtimestamp(value, timezone.utc)
    raise ValueError("a time (ISO 8601, or seconds since 1970) is needed")


def _to_json(value: Any) -> str | None:
    if isinstance(value, str):
        return _valid_text(value)
    return json.dumps(value, ensure_ascii=True, sort_keys=True, default=str, allow_nan=False)


def _not_finite(field: pa.Field, values: pa.Array) -> dict[int, str]:
    if not pa.types.is_floating(field.type):
        return {}
    bad = pc.fill_null(pc.invert(pc.is_finite(values)), False)
    if not pc.any(bad).as_py():
        return {}
    reason = f"{field.name} is not a finite number"
    return {int(i): reason for i in bad.to_numpy(zero_copy_only=False).nonzero()[0]}


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def column_paths(schema: pa.Schema, fields: Mapping[str, str]) -> list[str]:
    """Return the columns of a table, and the dotted paths among `fields` that lead into structs."""
    found = list(schema.names)
    for source in fields.values():
        kind: Any = schema
        for part in source.split("."):
            inside = part in kind.names if isinstance(kind, pa.Schema) else pa.types.is_struct(kind)
            place = kind.get_field_index(part) if inside else -1
            if place < 0:
                break
            kind = kind.field(place).type
        else:
            found.append(source)
    return list(dict.fromkeys(found))


def column_at(batch: pa.RecordBatch, source: str) -> pa.Array | None:
    """Return the column that a name or a dotted path leads to, None if there is none."""
    if source in batch.schema.names:
        return batch.column(source)
    if "." not in source or source not in column_paths(batch.schema, {"": source}):
        return None
    top, *rest = source.split(".")
    return pc.struct_field(batch.column(top), rest)
