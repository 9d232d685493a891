"""The ground floor: names, settings, cards, errors, units, keyed seeds. No torch."""

from luthier.core.card import Card, Setting
from luthier.core.catalogue import Catalogue
from luthier.core.config import FieldFacts, Flag, Switch, above, at_least, between, build, checked, fields_of, plain
from luthier.core.errors import *  # noqa: F403  # the whole tree, by its own __all__
from luthier.core.random import key
from luthier.core.shares import share_interval
from luthier.core.units import human_bytes, human_count, human_seconds, listed, several

__all__ = [  # noqa: F405
    "AnatomyError",
    "BadInput",
    "CannotMerge",
    "Card",
    "Catalogue",
    "CompositionError",
    "ConfigError",
    "DataError",
    "DiskFull",
    "Diverged",
    "FieldFacts",
    "Flag",
    "IntegrityError",
    "Interrupted",
    "Locked",
    "LuthierError",
    "ModelError",
    "NotPassed",
    "NothingTrains",
    "Refused",
    "ResourceError",
    "Setting",
    "Switch",
    "UnknownName",
    "UsageError",
    "WrongArithmetic",
    "WrongBase",
    "above",
    "at_least",
    "between",
    "build",
    "checked",
    "fields_of",
    "human_bytes",
    "human_count",
    "human_seconds",
    "key",
    "listed",
    "near",
    "plain",
    "several",
    "share_interval",
]
