"""Products with a frozen bf16 weight: plain against packed, forward and for the gradient of the input.

    python benchmarks/kernels_packed.py

Prints for each shape the ratio plain / packed of medians, taken in turn.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

SHAPES = ((384, 384), (1536, 384), (384, 1536), (576, 576), (1536, 576), (576, 1536))


def ratio(plain: Callable[[], object], packed: Callable[[], object], repeats: int) -> float:
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats + 3):
        for work, taken in zip((plain, packed), times, strict=True):
            start = time.perf_counter()
            work()
            taken.append(time.perf_counter() - start)
    return statistics.median(times[0][3:]) / statistics.median(times[1][3:])


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    reorder = torch.ops.mkldnn._reorder_linear_weight
    product = torch.ops.mkldnn._linear_pointwise
    print(f"{'rows':>5} {'d_out x d_in':>13} {'forward':>8} {'backward':>9}   plain / packed, medians")
    for rows in (128, 384, 1024, 2048):
        for d_out, d_in in SHAPES:
            x, g = torch.randn(rows, d_in).bfloat16(), torch.randn(rows, d_out).bfloat16()
            w, b = torch.randn(d_out, d_in).bfloat16(), torch.randn(d_out).bfloat16()
            there, back = reorder(w, 1024), reorder(w.t().contiguous(), 1024)
            forward = ratio(
                lambda x=x, w=w, b=b: torch.nn.functional.linear(x, w, b),
                lambda x=x, there=there, b=b: product(x, there, b, "none", [], ""),
                options.repeats,
            )
            backward = ratio(
                lambda g=g, w=w: g @ w, lambda g=g, back=back: product(g, back, None, "none", [], ""), options.repeats
            )
            print(f"{rows:>5} {d_out:>6} x {d_in:<4} {forward:>8.2f} {backward:>9.2f}")


if __name__ == "__main__":
    main()
