"""OPT: its smallest relative (350m) norms after the sublayers; the same code does both."""

from typing import Any

from luthier.anatomy.architecture import ARCHITECTURES, Architecture


@ARCHITECTURES.register("opt", model_types=("opt",))
class OPT(Architecture):
    @classmethod
    def pre_norm(cls, config: Any) -> bool | None:
        return bool(config.do_layer_norm_before)
