"""Evaluation: metrics, policy values with intervals, ceilings."""
