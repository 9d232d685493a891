"""Chains of runs."""
