"""Where a new folder can be made."""

from pathlib import Path

from luthier.core.errors import ConfigError, ResourceError

__all__ = ["refuse_taken"]


def refuse_taken(folder: Path, *, deep: bool = False) -> None:
    """Refuse a folder that cannot be made new, before anything is read for it.

    Args:
        deep: folders above it that do not exist are made too.

    Raises:
        ConfigError: it is there already, or its folder does not exist.
        ResourceError: it stands below a file.
    """
    if folder.exists() or folder.is_symlink():
        raise ConfigError(f"{folder}: is there already. Name a folder that does not exist.")
    above = next((parent for parent in folder.absolute().parents if parent.exists()), folder)
    if not above.is_dir():
        raise ResourceError(f"{folder}: {above} is a file, and no folder can stand in it. Name another place.")
    if not deep and above != folder.absolute().parent:
        raise ConfigError(f"{folder}: the folder {folder.parent} does not exist. Make it, or name another place.")
