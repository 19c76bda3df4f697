"""Metrics and intervals: pure functions of arrays that all other parts may use."""
