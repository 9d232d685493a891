"""A canonical place in a model. No torch."""

from dataclasses import dataclass

__all__ = ["KINDS", "Rows", "Site", "layer_in"]

# The closed vocabulary, in the order in which a listing shows it.
KINDS: dict[str, str] = {
    "embed": "the word embedding: token ids to vectors",
    "attn.q": "query projection of self-attention",
    "attn.k": "key projection of self-attention",
    "attn.v": "value projection of self-attention",
    "attn.o": "output projection of self-attention",
    "attn_out": "what self-attention gives, after its dropout, before the residual sum and any norm",
    "cross.q": "query projection of cross-attention",
    "cross.k": "key projection of cross-attention; reads the encoder",
    "cross.v": "value projection of cross-attention; reads the encoder",
    "cross.o": "output projection of cross-attention",
    "cross_out": "what cross-attention gives, placed as attn_out",
    "ffn.gate": "the activated half of a gated feed-forward layer",
    "ffn.up": "first feed-forward projection, or the half that is not activated where the layer is gated",
    "ffn.down": "last feed-forward projection",
    "experts.gate": "ffn.gate of one expert",
    "experts.up": "ffn.up of one expert",
    "experts.down": "ffn.down of one expert",
    "ffn_out": "what the feed-forward layer (or the mixture of experts) gives, placed as attn_out",
    "block_out": "the residual stream as the block hands it on",
    "norm": "a LayerNorm or RMSNorm",
    "head": "the last projection: to words, or to classes",
}


@dataclass(frozen=True)
class Rows:
    """Which output rows of a fused layer belong to one site.

    For g in range(groups): rows g * stride + offset up to g * stride + offset + width.

    >>> Rows(offset=2, width=1, stride=3, groups=2).indices()
    (2, 5)
    """

    offset: int
    width: int
    stride: int
    groups: int = 1

    @property
    def count(self) -> int:
        """How many rows there are."""
        return self.width * self.groups

    def indices(self) -> tuple[int, ...]:
        """The row numbers, in the site's own order."""
        starts = (g * self.stride + self.offset for g in range(self.groups))
        return tuple(row for start in starts for row in range(start, start + self.width))


@dataclass(frozen=True)
class Site:
    """One place, by its canonical name and by the name the model gives it.

    A site that is a projection or a norm owns numbers (`n_params`). `attn_out`, `cross_out`, `ffn_out` and
    `block_out` are places only: they own none, and the module at `path` returns (first, if it returns a tuple) the
    tensor that the kind names. Where a dropout module ends the sublayer, `path` is that dropout; where the model drops
    out through a function, `path` is the last projection, or the feed-forward module if it returns nothing else.
    """

    kind: str
    layer: int | None
    path: str  # dotted module path, as in model.named_modules()
    d_in: int
    d_out: int
    stack: str = ""  # "" in models of one stack, else "encoder" or "decoder"
    rows: Rows | None = None  # None: all rows of the layer
    transposed: bool = False  # the weight is stored as (d_in, d_out)
    param: str = "weight"  # name of the weight inside the module; 3-D expert weights have names of their own
    bias: str | None = None  # name of the bias inside the module
    expert: int | None = None
    n_experts: int = 0
    input_path: str | None = None  # sublayers: the first positional input of this module is what the sublayer reads
    residual_path: str | None = None  # sublayers: the first positional input of this module is the residual stream
    n_params: int = 0  # numbers that this site owns; a tied weight counts where it is first met
    tied: bool = False  # the weight is another site's too
    shared: int = 1  # how many layers use this one module (ALBERT)
    part: str = ""  # norms: which one, in order of use inside the block; or "embed", "final", ...

    @property
    def key(self) -> str:
        """The canonical name under which a tuning saves what it has here.

        >>> Site("attn.q", 3, "x", 4, 4).key, Site("norm", 0, "x", 4, 4, stack="encoder", part="1").key
        ('attn.q@3', 'norm@encoder.0.1')
        """
        place = (self.stack, "" if self.layer is None else str(self.layer), self.part)
        where = ".".join(word for word in place if word)
        expert = "" if self.expert is None else f"#{self.expert}"
        return self.kind + (f"@{where}" if where else "") + expert


def layer_in(key: str) -> int | None:
    """The layer that a canonical name says; None for a place outside of the layers.

    >>> layer_in("attn.q@3"), layer_in("norm@encoder.0.1"), layer_in("embed")
    (3, 0, None)
    """
    where = key.rpartition("@")[2].partition("#")[0].partition("~")[0] if "@" in key else ""
    return next((int(word) for word in where.split(".") if word.isdigit()), None)
