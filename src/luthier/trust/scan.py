"""What `luthier scan` says of a folder or file: structure only, and never that something is harmless."""

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from luthier.core import BadInput, LuthierError, near
from luthier.trust import config, gguf, model, safetensors, template
from luthier.trust._bytes import read_capped, show
from luthier.trust._limits import Limits

__all__ = ["Finding", "scan"]


@dataclass(frozen=True)
class Finding:
    """One thing to know.

    "refused": we will not read it. "warning": another program might run it. "fine": checked. "unjudged": no kind of
    file that is checked here, so nothing is said of it.
    """

    level: Literal["refused", "warning", "fine", "unjudged"]
    place: str
    what: str


def scan(path: str | os.PathLike[str], *, limits: Limits = Limits()) -> list[Finding]:  # noqa: B008  # frozen
    """Check every file below `path` by its kind; the worst findings come first.

    Raises:
        BadInput: there is nothing at `path`.
    """
    root = Path(path)
    if not root.exists():
        names = [p.name for p in root.parent.iterdir()] if root.parent.is_dir() else []
        raise BadInput(f"{show(str(root), 200)}: there is nothing there.{near(root.name, names)}")
    findings: list[Finding] = []
    count = 0
    waiting = [root]
    while waiting:
        place = waiting.pop()
        if place.is_dir() and (place == root or not place.is_symlink()):
            if (place / "config.json").exists():
                findings += _try(place, lambda p: model.check_folder(p, limits=limits), "model folder")
            waiting.extend(sorted(place.iterdir(), reverse=True))
            continue
        count += 1
        if count > limits.members:
            findings.append(Finding("refused", str(root), f"more than {limits.members} files; scan a smaller folder."))
            break
        findings += _file(place, root, limits)
    order = {"refused": 0, "warning": 1, "fine": 2, "unjudged": 3}
    return sorted(findings, key=lambda f: (order[f.level], f.place))


def _file(path: Path, root: Path, limits: Limits) -> list[Finding]:
    if path.is_symlink():
        inside = path.resolve().is_relative_to(root.resolve())
        if not path.exists() or not inside:
            return [Finding("warning", str(path), "a link that leads out of the folder, or nowhere.")]
    elif not stat.S_ISREG(path.lstat().st_mode):
        return [Finding("refused", str(path), "a pipe, device or socket.")]
    suffix = path.suffix.lower()
    checks: dict[str, tuple[Callable[[Path], Any], str]] = {
        ".safetensors": (lambda p: safetensors.check_header(p, limits=limits), "safetensors header"),
        ".gguf": (lambda p: gguf.check(p, limits=limits), "GGUF header"),
        ".json": (lambda p: config.read_json(p, allow_nonfinite=True, limits=limits), "JSON"),
        ".toml": (lambda p: config.read_toml(p, limits=limits), "TOML"),
        ".yaml": (lambda p: config.read_yaml(p, limits=limits), "YAML"),
        ".yml": (lambda p: config.read_yaml(p, limits=limits), "YAML"),
        ".jinja": (lambda p: template.check(_read(p, limits), limits=limits), "chat template"),
    }
    if suffix in checks:
        return _try(path, *checks[suffix])
    if suffix in model.PICKLES:
        return [Finding("refused", str(path), "may be pickle, which can run code when read; `luthier convert` it.")]
    if suffix in (".py", ".so", ".dll", ".dylib", ".sh", ".exe", ".pyc"):
        return [Finding("warning", str(path), "code. We never run it; another program may.")]
    return [Finding("unjudged", str(path), f"not judged: scan knows no {suffix or 'file without an ending'}.")]


def _read(path: Path, limits: Limits) -> str:
    return read_capped(path, 4 * limits.template_chars, "a chat template").decode("utf-8", "replace")


def _try(path: Path, check: Callable[[Path], Any], what: str) -> list[Finding]:
    try:
        check(path)
    except LuthierError as error:
        return [Finding("refused", str(path), str(error))]
    return [Finding("fine", str(path), f"{what}: checked.")]
