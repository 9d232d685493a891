"""Trackers that people use already: one file each, found by its name (`--track NAME`), its package imported where used.

Each file has PACKAGE, what pip installs, and a class `Sink`: made with the name of a run and its specification as one
level of plain values, told numbers by step, closed at the end.
"""
