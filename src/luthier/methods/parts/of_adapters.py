"""What methods have in common that make one adapter of several: tunings of pfeiffer_adapter on the same base."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Self

from luthier.anatomy import Anatomy, Site
from luthier.core import at_least
from luthier.methods.parts.adopted import agreed, no_sources
from luthier.methods.parts.behind import Behind, behind_params, behind_sites, closing_norm, reduced
from luthier.methods.parts.bottleneck import Activation
from luthier.surgery import Base, Edit, Method, Source, attach_each

__all__ = ["OneOfAdapters"]


@dataclass(frozen=True, kw_only=True)
class OneOfAdapters(Method):
    """An adapter of the sources' shape where they are; what its numbers become, `adopt` says."""

    reduction: Annotated[int | None, "of the adapters; left out, the sources'", at_least(1)] = None
    activation: Annotated[Activation | None, "of the adapters; left out, the sources'"] = None
    sites: Annotated[tuple[str, ...], "where to attach; none: where the sources are"] = ()

    starts_at_base: ClassVar[bool] = False
    default_lr: ClassVar[float] = 1e-3
    sources: ClassVar[tuple[str, ...]] = ("pfeiffer_adapter",)

    def fitted(self, sources: Sequence[Source]) -> Self:
        return replace(self, **{name: agreed(self, sources, name) for name in ("reduction", "activation", "sites")})

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        if self.reduction is None:
            raise no_sources(self, "adapters to make one of")
        norms = {site.key: closing_norm(anatomy, site, self.name) for site in self._sites(anatomy)}
        yield from attach_each(self._sites(anatomy), lambda site, base: self.adapter(base, norms[site.key]))

    def adapter(self, base: Base, norm: str) -> Behind:
        """The one at a place, whose numbers `adopt` replaces."""
        return Behind(base, norm, reduced(base.site, self.reduction or 16), self.activation or "relu")

    def n_params(self, anatomy: Anatomy) -> int:
        return behind_params(self._sites(anatomy), self.reduction or 16)

    def _sites(self, anatomy: Anatomy) -> tuple[Site, ...]:
        return behind_sites(anatomy, self.sites, self.name)
