"""A method of your own, outside the package: scale each feature of what a layer gives, low and high end apart.

    y' = y * (1 + s_low  where |y| < 1,  1 + s_high  elsewhere)          s_low, s_high: (d_out,)

Both start at zero, so the tuned model starts as the base model. Made up for this example; there is no paper.

Count: 2 * d_out per site.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from luthier import DataSpec, RunSpec, train
from luthier.anatomy import Site
from luthier.core import above
from luthier.samples import load_sample
from luthier.surgery import METHODS, Attachment, Base, PerSite


@METHODS.register("two_gains", family="additive", paper="none")
@dataclass(frozen=True, kw_only=True)
class TwoGains(PerSite):
    """Settings of the method. Each field is an option: `--set edge=0.5`, `settings={"edge": 0.5}`."""

    sites: Annotated[tuple[str, ...], "where to attach"] = ("attn.v", "ffn.down")
    edge: Annotated[float, "where the low end stops", above(0)] = 1.0

    starts_at_base: ClassVar[bool] = True
    default_lr: ClassVar[float] = 1e-2

    def params_at(self, site: Site) -> int:
        return 2 * site.d_out

    def build(self, site: Site, base: Base) -> Attachment:
        return Gains(site.d_out, self.edge)


class Gains(Attachment):
    """Sits at one site and changes what its layer gives."""

    needs_input = False

    def __init__(self, d_out: int, edge: float) -> None:
        super().__init__()
        self.edge = edge
        self.low = nn.Parameter(torch.zeros(d_out))
        self.high = nn.Parameter(torch.zeros(d_out))

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y * (1 + torch.where(y.abs() < self.edge, self.low, self.high))


# Freezing, saving, resuming, switching and the command line's options are the library's work.
if __name__ == "__main__":
    home = Path(tempfile.mkdtemp())
    rows = [row for row in load_sample("trec6").train if row["label"] in ("HUM", "NUM")][:300]
    (home / "questions.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    spec = RunSpec(
        model="sample:minilm-l6",
        data=DataSpec(source=str(home / "questions.jsonl")),
        method="two_gains",
        settings={"edge": 0.5},
        epochs=4,
        out=str(home / "run"),
    )
    result = train(spec)
    print(f"{result.n_params:,} numbers trained, accuracy {result.scores['accuracy']:.2f}")
