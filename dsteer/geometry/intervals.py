"""Intervals: resampling by conversation, with v refitted in each draw."""
