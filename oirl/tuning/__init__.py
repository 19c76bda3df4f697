"""Improving language models: supervised updates from logs, rewards and relabelling."""
