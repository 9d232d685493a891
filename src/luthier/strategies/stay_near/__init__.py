"""Staying near where the weights were: at the start, or a moment ago."""
