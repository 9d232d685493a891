"""Answers that are kept between calls, a JSON file each: under a digest of its own content, and the oldest go first.

A file that is damaged, or that cannot be written, is none: whoever asks computes again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier.core import LuthierError
from luthier.runs import durable

__all__ = ["keep", "kept"]


def kept(path: Path) -> dict[str, Any]:
    """What is kept there; nothing where there is no file, or a damaged one."""
    try:
        content = json.loads(path.read_bytes())
        return content if content.pop("digest") == _digest(content) else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def keep(path: Path, content: Mapping[str, Any], most: int) -> None:
    """Keep it, beside at most `most` - 1 others of the folder: what was written longest ago goes."""
    text = json.dumps({**content, "digest": _digest(content)}, ensure_ascii=True)
    with contextlib.suppress(LuthierError, OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        durable.write_bytes(path, text.encode("ascii"))
        for old in sorted(path.parent.glob("*.json"), key=lambda one: one.stat().st_mtime_ns)[:-most]:
            old.unlink(missing_ok=True)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=True).encode()).hexdigest()
