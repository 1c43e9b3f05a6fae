"""Preference pairs: reading them, writing synthetic ones, splitting them."""
