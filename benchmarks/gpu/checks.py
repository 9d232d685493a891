"""The contract of every method on a device, and runs that are stopped there and go on to the same bits."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cells import Trainer, has_phases, learning_rate, logits, small, task_of
from little import little_spec
from tiny import inputs, tiny
from torch import Tensor
from torch.testing import assert_close

from benchmarks.gpu.part import Record, first_line
from luthier import kernels
from luthier.core import AnatomyError
from luthier.surgery import METHODS, Tuned, attach, load
from luthier.workflow import verify_resume

__all__ = ["contract", "resume"]

ARCH = "llama"
NEAR = {"atol": 1e-4, "rtol": 1e-3}
"""fp32 on both sides; products are added up in another order on another device"""

Made = tuple[Tuned, Any, dict[str, Tensor]]


class _Refused(Exception):
    """The method does not go with this architecture, and says so."""


def made(name: str, device: str, dtype: torch.dtype = torch.float32) -> Made:
    """The method on a tiny model that stands on the device, and a batch beside it."""
    model = tiny(ARCH, task_of(name, ARCH)).to(device, dtype)
    batch = inputs(model)
    try:
        return attach(model, small(name), seed=0), model, batch
    except AnatomyError as error:
        raise _Refused(str(error)) from error


def shaken(made: Made) -> Made:
    """Every trained number moved off its start; the same draws on every device."""
    tuned, model, batch = made
    Trainer(tuned, model, batch, total=200)  # methods that look at data have done so
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in tuned.trained().values():
            noise = torch.randn(parameter.shape, generator=draw) * 0.05
            parameter.add_(noise.to(parameter.device, parameter.dtype))
    tuned.state.constrain()
    model.eval()
    return made


def computed(made: Made) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradients of the loss, in fp32 on the CPU."""
    tuned, model, batch = made
    out = model(**batch)
    out.loss.backward()
    gradients = {n: p.grad.float().cpu() for n, p in tuned.trained().items() if p.grad is not None}
    return out.logits.detach().float().cpu(), gradients


def _alike(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert_close(one[0], other[0], **NEAR, msg=lambda text: f"logits: {text}")
    assert one[1].keys() == other[1].keys() and one[1], "gradients of other tensors"
    for name, gradient in one[1].items():
        assert_close(gradient, other[1][name], **NEAR, msg=lambda text, name=name: f"gradient of {name}: {text}")


# --- the checks: each takes a method's name and a device, and raises where something is wrong


def learns_and_leaves_the_frozen_alone(name: str, device: str) -> None:
    tuned, model, batch = made(name, device)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    rate = learning_rate(tuned.tuning().method)
    losses = Trainer(tuned, model, batch, total=30, lr=rate, decay=0.0).run().losses
    assert sum(losses[-5:]) / 5 < 0.97 * losses[0], f"the loss goes from {losses[0]:.4f} to {losses[-1]:.4f}"
    now = dict(model.named_parameters())
    moved = [n for n, value in frozen.items() if not torch.equal(now[n], value)]
    assert not moved, f"frozen and moved: {moved[:3]}"
    astray = [n for n, p in tuned.trained().items() if p.device.type != torch.device(device).type]
    assert not astray, f"not on {device}: {astray[:3]}"


def saved_and_loaded_computes_the_same(name: str, device: str) -> None:
    tuned, model, batch = made(name, device)
    Trainer(tuned, model, batch, total=8 if has_phases(tuned) else 4).run()
    tuned.finish()
    model.eval()
    wanted = logits(model, batch)
    with tempfile.TemporaryDirectory() as folder:
        tuned.save(Path(folder) / "tuning")
        for place in (device, "cpu"):
            fresh = tiny(ARCH, task_of(name, ARCH)).to(place)
            load(fresh, Path(folder) / "tuning")
            found = logits(fresh, inputs(fresh))
            if place == device:
                assert torch.equal(found, wanted), f"other bits, off by {float((found - wanted).abs().max()):.3g}"
            else:
                assert_close(found, wanted.cpu(), **NEAR)


def equals_the_cpu(name: str, device: str) -> None:
    one = shaken(made(name, "cpu"))
    other = made(name, device)
    Trainer(*other, total=200)
    other[0].state.load_tensors({n: t.to(device) for n, t in one[0].state.tensors().items()})
    other[1].eval()
    _alike(computed(other), computed(one))


def fast_functions_equal_plain_ones(name: str, device: str) -> None:
    one, other = shaken(made(name, device)), shaken(made(name, device))
    other[0].forward.route_attention()
    other[0].fast.accelerate()
    with kernels.plain():
        wanted = computed(one)
    _alike(computed(other), wanted)


def trains_in_bf16(name: str, device: str) -> None:
    tuned, model, batch = made(name, device, torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in tuned.trained().values())
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        trainer = Trainer(tuned, model, batch, total=8 if has_phases(tuned) else 3).run()
    assert all(torch.isfinite(torch.tensor(trainer.losses)))
    assert torch.isfinite(logits(model, batch).float()).all()


CHECKS: tuple[Callable[[str, str], None], ...] = (
    learns_and_leaves_the_frozen_alone,
    saved_and_loaded_computes_the_same,
    equals_the_cpu,
    fast_functions_equal_plain_ones,
    trains_in_bf16,
)


def contract(record: Record, device: str, methods: list[str] | None = None) -> None:
    """Every check on every method, each by itself: one that fails does not hide the others."""
    for name in methods or METHODS.names():
        found: dict[str, str] = {}
        for check in CHECKS:
            try:
                check(name, device)
                found[check.__name__] = "passed"
            except _Refused:
                found[check.__name__] = "refused"
            except Exception as error:
                found[check.__name__] = first_line(error)
        wrong = [f"{n}: {words}" for n, words in found.items() if words not in ("passed", "refused")]
        record(name, {"ok": not wrong, "checks": found, **({"note": "WRONG " + "; ".join(wrong)} if wrong else {})})


def resume(record: Record, device: str, methods: list[str], precisions: list[str], steps: int = 4) -> None:
    """Runs of 2 n steps against n and n: digests of what trains, of the optimiser, of the tuning and of the log."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        for method in methods:
            for precision in precisions:
                name = f"{method}, {precision}"
                out = home / f"{method}-{precision}"
                try:
                    spec = little_spec(home, method, ARCH, device=device, precision=precision)
                    proof = verify_resume(spec, steps, out)
                except Exception as error:
                    record(name, {"ok": False, "error": first_line(error), "note": f"WRONG {first_line(error)}"})
                    continue
                differ = [part for part, two in proof["parts"].items() if two["whole"] != two["resumed"]]
                words = {"note": f"WRONG {', '.join(differ)} differ"} if differ else {}
                record(name, {"ok": bool(proof["equal"]), "steps": proof["steps"], "differ": differ, **words})
