"""Paired hidden states: where and how they are read, and how they are kept."""
