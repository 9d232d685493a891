"""Answers that the model writes itself, and what they are rewarded with."""
