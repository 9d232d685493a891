"""ViT: the norm behind the last block is the only one outside the blocks; patches are projected, there is no `embed`."""

from luthier.anatomy.architecture import ARCHITECTURES, Architecture


@ARCHITECTURES.register("vit", model_types=("vit",))
class ViT(Architecture):
    outside_norms = {"layernorm": "final"}
