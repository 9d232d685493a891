"""Tools for testing what should survive: faults at numbered operations, damage, processes that are cheap to kill."""

from luthier.runs.forkserver import Outcome, Template
from luthier.testing.faults import Damage, count_ops, damage, every_operation, installed

__all__ = ["Damage", "Outcome", "Template", "count_ops", "damage", "every_operation", "installed"]
