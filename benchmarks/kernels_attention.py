"""Which way of attention is fastest by device, type and shape; the table that `luthier.kernels.attend` reads.

    python benchmarks/kernels_attention.py            print
    python benchmarks/kernels_attention.py --write    also write src/luthier/kernels/attention_table.json

Thread CPU time on a CPU (one thread, interleaved medians, no mask, not causal, so that both ways do the same work).
"""

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
from _pairs import pair
from torch import Tensor

from luthier.kernels import attention

TABLE = Path(attention.__file__).with_name("attention_table.json")

# batch, heads, queries, keys, width
SHAPES = [
    (32, 12, 16, 16, 32),
    (32, 12, 32, 32, 32),
    (32, 12, 128, 128, 32),
    (8, 9, 256, 256, 64),
    (4, 8, 512, 512, 64),
    (1, 8, 1024, 1024, 64),
    (1, 4, 2048, 2048, 64),
    (8, 9, 1, 128, 64),
    (8, 9, 1, 1024, 64),
]


def forced(name: str) -> list[dict[str, Any]]:
    """A table that always says `name`."""
    one = {"queries": 1, "keys": 1, "best": name, "device": "cpu"}
    return [{**one, "dtype": d, "training": t} for d in ("float32", "bfloat16") for t in (True, False)]


def run(name: str, qkv: tuple[Tensor, ...], grad: Tensor, heads: int, training: bool) -> None:
    """One call between two linear layers, from (B, T, H · D) to the same, with its backward pass if training."""
    attention._table = lambda: forced(name)  # type: ignore[assignment]
    q, k, v = (x.view(*x.shape[:2], heads, -1).transpose(1, 2) for x in qkv)
    out = attention.attend(q, k, v, scaling=q.shape[-1] ** -0.5)
    out = out.transpose(1, 2).reshape(grad.shape)
    if training:
        torch.autograd.grad(out, qkv, grad)


def main() -> None:
    """Measure, print, and write if asked."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true")
    write = parser.parse_args().write
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for b, h, t, s, d in SHAPES:
            for training in (True, False):
                if training and t == 1:
                    continue
                generator = torch.Generator().manual_seed(0)
                qkv = tuple(
                    torch.randn(b, n, h * d, generator=generator).to(dtype).requires_grad_(training) for n in (t, s, s)
                )
                grad = torch.randn(b, t, h * d, generator=generator).to(dtype)
                calls = {n: lambda n=n, a=(qkv, grad, h, training): run(n, *a) for n in ("sdpa", "products")}
                ms = pair(calls, repeats=5 if t >= 256 else 15)
                best = min(ms, key=ms.__getitem__)
                ratio = ms["sdpa"] / ms["products"]
                name = str(dtype).removeprefix("torch.")
                rows.append(
                    {"device": "cpu", "dtype": name, "queries": t, "keys": s, "training": training, "best": best}
                    | {"sdpa_over_products": round(ratio, 2), "shape": [b, h, t, s, d]}
                )
                print(f"{name:9} {(b, h, t, s, d)!s:24} training={training!s:5} {ms}  sdpa/products {ratio:5.2f}")
    if write:
        machine = {"processor": platform.machine(), "torch": torch.__version__}
        machine["capability"] = torch.backends.cpu.get_cpu_capability()
        lines = ",\n    ".join(json.dumps(row) for row in rows)
        head = json.dumps({"command": "python benchmarks/kernels_attention.py --write", "machine": machine})
        TABLE.write_text(f'{head[:-1]}, "rows": [\n    {lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
