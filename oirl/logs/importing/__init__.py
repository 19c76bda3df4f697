"""Importers: files of other tools and tables of users to logs."""
