"""What methods have in common that read a frozen model, so that no gradient enters it, or begin with its head."""

from dataclasses import dataclass
from typing import ClassVar

from luthier.anatomy import Anatomy
from luthier.core import AnatomyError
from luthier.surgery import Method

__all__ = ["FrozenBelow", "no_new_head"]


@dataclass(frozen=True, kw_only=True)
class FrozenBelow(Method):
    """Beside it only a head can train."""

    through_trunk: ClassVar[bool] = False

    def conflicts(self, other: Method) -> str | None:
        if other.is_a("head_only"):
            return None
        return f"no gradient enters the frozen model that {self.name} reads, so nothing in it can train."


def no_new_head(anatomy: Anatomy, asked_by: str, why: str) -> AnatomyError:
    """What to say on a model without a new task head. why: it is needed, such as "nothing else trains"."""
    return AnatomyError(
        f"{asked_by}: this {anatomy.model_type} model has no new task head, and {why}. Use it for classification, or "
        "choose a method that changes the model, such as lora."
    )
