"""Gradients that are made otherwise than by one backward pass of the whole step."""
