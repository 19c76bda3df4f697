"""A fingerprint of a table's content that does not depend on how its rows are cut into batches."""

from __future__ import annotations

from hashlib import sha256

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


class Fingerprint:
    """Hash the content of record batches, column by column, in the order in which they come.

    Nulls, lengths and data go to a hasher each, so that cutting the rows elsewhere changes nothing.
    Columns that are null throughout do not count: a log with and without an empty column is the same log.
    """

    def __init__(self, schema: pa.Schema) -> None:
        self._hashers = {field.name: (sha256(), sha256()) for field in schema}
        self._known = dict.fromkeys(self._hashers, False)
        self._rows = 0

    def update(self, batch: pa.RecordBatch) -> None:
        """Add a batch that has the schema's columns."""
        self._rows += batch.num_rows
        for name, (shape, data) in self._hashers.items():
            column = batch.column(name)
            # Lengths with -1 for null say both where the nulls are and where each text ends.
            if pa.types.is_string(column.type):
                lengths = pc.fill_null(pc.binary_length(column), -1).to_numpy(zero_copy_only=False)
                data.update(_text_bytes(column))
            else:
                lengths = column.is_valid().to_numpy(zero_copy_only=False).astype(np.int32) - 1
                data.update(_value_bytes(column).data)
            shape.update(np.ascontiguousarray(lengths, dtype=np.int32).data)
            self._known[name] = self._known[name] or column.null_count < len(column)

    def hexdigest(self) -> str:
        """Return 32 hexadecimal digits for everything added so far."""
        total = sha256(str(self._rows).encode())
        for name in sorted(self._hashers):
            if self._known[name]:
                shape, data = self._hashers[name]
                total.update(name.encode() + shape.digest() + data.digest())
        return total.hexdigest()[:32]


def _text_bytes(column: pa.Array) -> memoryview:
    if len(column) == 0:
        return memoryview(b"")
    if column.null_count:
        column = column.drop_null()  # Arrow allows any bytes below a null
        if len(column) == 0:
            return memoryview(b"")
    offsets = np.frombuffer(column.buffers()[1], dtype=np.int32)[column.offset : column.offset + len(column) + 1]
    body = column.buffers()[2]
    return memoryview(b"" if body is None else body)[int(offsets[0]) : int(offsets[-1])]


def _value_bytes(column: pa.Array) -> np.ndarray:
    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.int64())
    zero = pa.scalar(False) if pa.types.is_boolean(column.type) else pa.scalar(0, column.type)
    return np.ascontiguousarray(pc.fill_null(column, zero).to_numpy(zero_copy_only=False))
