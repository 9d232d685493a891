"""A word of the command line that names one of a few ways to do something, some of which take a package more."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

from luthier.core import ConfigError, UsageError, near

__all__ = ["one_of"]


def one_of(option: str, name: str, extras: Mapping[str, str]) -> None:
    """Refuse a way that is not there, before work starts.

    Args:
        option: that the word was given to.
        extras: each way, and the extra of luthier whose package of the way's own name it takes; none where it is empty.

    >>> one_of("--engine", "local", {"local": "", "ray": "ray"})

    Raises:
        ConfigError: none is called so.
        UsageError: its package is not installed.
    """
    if name not in extras:
        raise ConfigError(f"{option} {name}: there are {', '.join(extras)}.{near(name, list(extras))}")
    if extras[name] and find_spec(name) is None:
        raise UsageError(f"{option} {name}: the package {name} is not installed. pip install luthier[{extras[name]}]")
