"""Reward models: embedders, scorers of prompts, calibration and their saved form."""
