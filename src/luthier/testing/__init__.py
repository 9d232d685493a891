"""Tools for testing what should survive: faults at numbered operations, damage, processes that are cheap to kill."""

from luthier.testing.faults import Damage, count_ops, damage, every_operation, installed
from luthier.testing.forkserver import Outcome, Template

__all__ = ["Damage", "Outcome", "Template", "count_ops", "damage", "every_operation", "installed"]
