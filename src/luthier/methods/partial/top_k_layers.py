"""Top layers: train the last k blocks, the head, and what stands between them.

    h_l = block_l(h_{l-1})          l > L - k trains; everything below stays, and runs without a graph

Nothing changes before the first step. What stands between is a pooler, and the norm behind the last block where a model
has one. The matrix that writes words belongs to the embeddings, tied to them or not.

A standard baseline, FT-top2 in Li and Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation",
arXiv:2101.00190, section 5.

Count: the numbers of k blocks, 4 d^2 + 4 d + 2 d m + m + d + 4 d each in BERT, and of the pooler, d^2 + d.
Claims: a baseline that other methods are held to; the usual setting is k = 2.
Cost: the backward pass ends below the k-th block from the top.
Use it when: memory or time is short and files may be large.
Not when: the task needs other features than the lower blocks give: lora reaches all of them for fewer numbers.
Pitfalls: counting from the bottom; a tied output matrix that trains would move the embedding below the frozen blocks,
so neither trains without `embeddings`; in an encoder-decoder it is the decoder's blocks that are meant, since a graph
through an encoder's last blocks would run through every block of the decoder.
"""

from dataclasses import dataclass
from typing import Annotated

from luthier.anatomy import Anatomy, Block
from luthier.core import ConfigError, at_least
from luthier.methods.parts.in_place import TrainsInPlace
from luthier.surgery import METHODS


@METHODS.register("top_k_layers", family="partial", paper="arXiv:2101.00190")
@dataclass(frozen=True, kw_only=True)
class TopKLayers(TrainsInPlace):
    """Settings of training the top."""

    k: Annotated[int, "how many of the last blocks train", at_least(1)] = 2
    embeddings: Annotated[bool, "also everything outside the blocks, embeddings among it"] = False
    encoder: Annotated[bool, "in an encoder-decoder: also the encoder's last k blocks"] = False

    def tensors(self, anatomy: Anatomy) -> list[str]:
        chosen = tuple(f"{b.path}." for b in self._blocks(anatomy))
        inside = tuple(f"{b.path}." for b in anatomy.blocks)
        heads, final = set(anatomy.head_tensors), self._final_norms(anatomy)
        names = []
        for name in anatomy.tensors:
            between = ".pooler." in f".{name}" or name in final
            outside = not name.startswith(inside) and (between or self.embeddings)
            if name not in heads and (name.startswith(chosen) or outside):
                names.append(name)
        return names

    def _blocks(self, anatomy: Anatomy) -> list[Block]:
        """The last k blocks of each stack that is meant."""
        found: list[Block] = []
        for stack in self._stacks(anatomy):
            blocks = sorted((b for b in anatomy.blocks if b.stack == stack), key=lambda b: b.layer)
            if self.k > len(blocks):
                of = f"the {stack} of this" if stack else "this"
                raise ConfigError(
                    f"top_k_layers.k: {self.k}, but {of} {anatomy.model_type} model has {len(blocks)} blocks. "
                    f"Set it to {len(blocks)} or less, or use full."
                )
            found += blocks[-self.k :]
        return found

    def _stacks(self, anatomy: Anatomy) -> tuple[str, ...]:
        if anatomy.is_encoder_decoder:
            return ("encoder", "decoder") if self.encoder else ("decoder",)
        return (anatomy.text_stack,) if anatomy.text_stack else anatomy.stacks

    def _final_norms(self, anatomy: Anatomy) -> set[str]:
        """Tensors of the norms behind the last blocks that are meant."""
        stacks = self._stacks(anatomy)
        found = [s for s in anatomy.all_sites if s.kind == "norm" and s.part == "final" and s.stack in stacks]
        return {f"{s.path}.{short}" for s in found for short in (s.param, s.bias) if short}
