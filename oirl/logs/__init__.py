"""The log: read, write, import, grade and split."""
