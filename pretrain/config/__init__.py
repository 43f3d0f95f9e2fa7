"""Recipes: the schema, the loader, the checks, and how mistakes are told."""
