"""Text is written before the answer."""
