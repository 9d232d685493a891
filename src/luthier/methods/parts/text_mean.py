"""The mean over the real tokens of each row."""

from torch import Tensor

from luthier.surgery.prompts import with_vectors

__all__ = ["mean_over_text"]


def mean_over_text(values: Tensor, mask: Tensor | None) -> Tensor:
    """(B, T, n) -> (B, 1, n). mask: (B, tokens), which may know of fewer tokens: vectors stand before."""
    if mask is None:
        return values.mean(1, keepdim=True)
    weights = mask[:, -values.shape[1] :].to(values.dtype)
    front = values.shape[1] - weights.shape[1]  # prompt vectors, which the mask of the text does not know
    weights = with_vectors(weights, front)[..., None]
    mean: Tensor = (values * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True).clamp(min=1.0)
    return mean
