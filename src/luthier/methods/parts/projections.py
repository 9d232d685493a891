"""What methods have in common that change the weight of projections: where they sit, and what may not be asked."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from luthier.anatomy import Anatomy, Site
from luthier.core import ConfigError
from luthier.methods.parts.low_rank import check_projections
from luthier.surgery import PerSite

__all__ = ["AtProjections"]


@dataclass(frozen=True, kw_only=True)
class AtProjections(PerSite):
    """One attachment for each projection, by default of queries and values; it merges, if nothing else is said."""

    sites: Annotated[tuple[str, ...], "where to attach: attn.q, ffn, attn.q@0-5, *@last4"] = ("attn.q", "attn.v")

    mergeable: ClassVar[bool] = True

    def places(self, anatomy: Anatomy) -> tuple[Site, ...]:
        if not self.sites:
            raise ConfigError(
                f"{self._label}.sites: none are named, so nothing would train. Name some, such as attn.q; * stands for "
                "every projection."
            )
        return check_projections(anatomy, super().places(anatomy), self._label, getattr(self, "dropout", 0.0))
