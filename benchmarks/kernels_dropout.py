"""Keyed dropout against the framework's, forward, in one thread: `python benchmarks/kernels_dropout.py`."""

import sys

import torch
import torch.nn.functional as F
from _pairs import pair

import luthier.kernels

module = sys.modules["luthier.kernels.dropout"]


def main() -> None:
    """Print medians and the ratio by shape, type and chunk."""
    for shape in ((128, 384), (1536, 384), (1536, 1536)):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(shape).to(dtype)
            for power in (13, 14, 15, 16, 17):
                module._CHUNK, module._DRAWS = 1 << power, 4 << power  # type: ignore[attr-defined]
                module._counters.clear()  # type: ignore[attr-defined]
                ms = pair(
                    {
                        "framework": lambda x=x: F.dropout(x, 0.1, True),
                        "keyed": lambda x=x: luthier.kernels.dropout(x, 0.1, seed=3),
                    }
                )
                print(
                    f"{shape!s:14} {dtype!s:15} chunk 2^{power}  framework {ms['framework']:7.3f} ms"
                    f"  keyed {ms['keyed']:7.3f} ms  {ms['framework'] / ms['keyed']:5.2f} x"
                )


if __name__ == "__main__":
    main()
