"""Steering vectors: what they are, and how they are built from paired activations."""
