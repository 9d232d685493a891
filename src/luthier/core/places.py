"""Where a new folder can be made."""

import os
from pathlib import Path

from luthier.core.errors import ConfigError, ResourceError

__all__ = ["place_of", "refuse_taken"]


def place_of(folder: Path, advice: str = "Name another place.") -> Path:
    """The nearest folder above a new one that is there.

    Raises:
        ResourceError: it is a file, or this user may not write to it.
    """
    there = next((parent for parent in folder.absolute().parents if parent.exists()), folder.absolute())
    if not there.is_dir():
        raise ResourceError(f"{folder}: {there} is a file, and no folder can stand in it. {advice}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ResourceError(f"{folder}: this user may not write to {there}, or its disk is read-only. {advice}")
    return there


def refuse_taken(folder: Path, *, deep: bool = False) -> None:
    """Refuse a folder that cannot be made new, before anything is read for it.

    Args:
        deep: folders above it that do not exist are made too.

    Raises:
        ConfigError: it is there already, or its folder does not exist.
        ResourceError: see `place_of`.
    """
    if folder.exists() or folder.is_symlink():
        raise ConfigError(f"{folder}: is there already. Name a folder that does not exist.")
    if place_of(folder) != folder.absolute().parent and not deep:
        raise ConfigError(f"{folder}: the folder {folder.parent} does not exist. Make it, or name another place.")
