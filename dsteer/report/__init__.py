"""Figures and the one-file HTML report, from artifacts alone: no torch, no models."""
