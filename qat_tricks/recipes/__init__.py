"""Recipes: stages of tricks, read from YAML, run without a trainer, in one, or in several fits."""
