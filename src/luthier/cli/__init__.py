"""The command line. One file is one verb; a new file is offered by being there. Words become plain values, no more."""

from luthier.cli._main import main

__all__ = ["main"]
