"""Engines that run language models, and what is collected with them."""
