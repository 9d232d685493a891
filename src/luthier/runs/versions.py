"""Formats change: an older one is migrated in memory (the old file is never rewritten), a newer one is refused."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from luthier.core import IntegrityError

__all__ = ["Migration", "migrate"]

Migration = Callable[[dict[str, Any]], dict[str, Any]]


def migrate(
    content: dict[str, Any], current: int, steps: Mapping[int, Migration], where: Path, field: str = "version"
) -> dict[str, Any]:
    """Bring `content` from its own version to `current`.

    Args:
        steps: version -> what turns content of that version into the next one's.

    Raises:
        IntegrityError: it is newer than `current`, too old, or says no version.
    """
    version = content.get(field)
    if not isinstance(version, int) or isinstance(version, bool):
        raise IntegrityError(f"{where}: says no format version (its {field!r} is {version!r}). Restore it from a copy.")
    if version > current:
        raise IntegrityError(
            f"{where}: format version {version} is newer than the {current} that this luthier knows."
            " Update luthier, or use the version that wrote it."
        )
    while version < current:
        if version not in steps:
            raise IntegrityError(
                f"{where}: format version {version} is older than any that this luthier can read"
                f" (it reads {min(steps, default=current)} to {current}). Use the version that wrote it."
            )
        content = {**steps[version](dict(content)), field: version + 1}
        version += 1
    return content
