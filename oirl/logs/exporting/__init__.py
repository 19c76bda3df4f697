"""Exporters: logs and preference pairs to files that other tools load."""
