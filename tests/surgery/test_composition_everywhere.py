"""Methods side by side on every architecture, each reading what its own place reads.

What sits at a projection reads what the projection reads; what sits at the end of a sublayer, what its own tap heard.
So also where both are one module (attn.o and attn_out of Llama, ffn.down and ffn_out of OPT).
"""

from typing import Any

import pytest
import torch
from cells import shake
from kinds import logits
from tiny import ALSO, TINY, inputs, tiny
from torch import Tensor

from luthier.core import AnatomyError, CannotMerge, CompositionError, ConfigError
from luthier.surgery import Tuned, attach, method
from luthier.surgery.socket import ORDER, Socket

OUTER = ("attn.o", "ffn.down")
PAIRS: dict[str, dict[str, Any]] = {
    "lora+parallel_adapter": {"lora.sites": OUTER, "parallel_adapter.placement": "both"},
    "ia3+mam": {},
    "ia3+parallel_adapter": {
        "ia3.inputs": OUTER, "parallel_adapter.reads": "normed", "parallel_adapter.placement": "both",
    },
    "dora+sequential_adapter": {"dora.sites": OUTER},
    "adalora+unipelt": {"adalora.sites": OUTER},
    "lora+adamix": {"lora.sites": OUTER},
    "lora+propetl": {"lora.sites": OUTER},
    "ia3+lora+parallel_adapter+sequential_adapter": {
        "ia3.inputs": OUTER, "lora.sites": OUTER, "parallel_adapter.placement": "both",
    },
}  # fmt: skip
SIZES = {
    "lora.rank": 3, "dora.rank": 3, "adalora.rank": 4, "adalora.target_rank": 2, "parallel_adapter.width": 5,
    "sequential_adapter.width": 6, "mam.length": 3, "mam.mlp_width": 7, "mam.width": 5, "unipelt.rank": 2,
    "unipelt.length": 3, "unipelt.mlp_width": 7, "unipelt.width": 5, "adamix.width": 4, "propetl.width": 6,
}  # fmt: skip
# One of each way to end a sublayer: dropout of its own, a projection, a projection of both, with decoders and encoders.
QUICK = ("bert", "llama", "opt", "bart", "gpt2")
EVERY = [a if a in QUICK else pytest.param(a, marks=pytest.mark.slow) for a in (*TINY, *ALSO)]
# Where a projection and the end of a sublayer are one module.
ONE = {"llama": {"attn_out"}, "opt": {"ffn_out", "attn_out"}, "bart": {"attn_out", "ffn_out"}, "gemma2": {"attn_out"}}


def made(arch: str, words: str, **more: Any) -> Tuned | None:
    """The methods on a tiny model in float64, moved off their start; None where the architecture is refused."""
    names = words.split("+")
    settings = {k: v for k, v in SIZES.items() if k.split(".")[0] in names} | PAIRS.get(words, {}) | more
    model = tiny(arch)
    try:
        tuned = attach(model, method(words, settings), train_head=False)
    except AnatomyError:
        assert arch not in QUICK
        short = {k: ("attn.o",) for k, v in settings.items() if v == OUTER}  # experts have no ffn.down
        try:
            tuned = attach(model, method(words, settings | short), train_head=False)
        except AnatomyError:
            return None
    shake(tuned, 0.1)
    widen(model)
    return tuned


def widen(model: Any) -> None:
    """To float64, which products of groups of experts do not take."""
    if getattr(model.config, "_experts_implementation", None) == "grouped_mm":
        model.config._experts_implementation = "batched_mm"
    model.double()


def first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    found: Tensor = args[0] if args else kwargs["hidden_states"]
    return found.detach()


class Ear:
    """Writes down what each socket was called with and gave, and what each module at a sublayer's start was given."""

    def __init__(self, tuned: Tuned) -> None:
        self.calls: dict[int, list[tuple[tuple[Any, ...], dict[str, Any], Any]]] = {}
        self.heard: dict[str, list[Tensor]] = {}
        self.handles: list[Any] = []
        model = tuned.model
        self.sockets = [m for m in dict.fromkeys(model.modules()) if isinstance(m, Socket) and m.plugs]
        for socket in self.sockets:

            def note(module: Any, args: Any, kwargs: Any, out: Any) -> None:
                self.calls.setdefault(id(module), []).append((args, kwargs, out))

            self.handles.append(socket.register_forward_hook(note, with_kwargs=True))
            for plug in socket.plugs:
                for path in {plug.site.input_path, plug.site.residual_path} - {None}:
                    if path not in self.heard:
                        self.heard[path] = []

                        def hear(module: Any, args: Any, kwargs: Any, path: str = path) -> None:
                            self.heard[path].append(first(args, kwargs))

                        self.handles.append(model.get_submodule(path).register_forward_pre_hook(hear, with_kwargs=True))

    def off(self) -> None:
        for handle in self.handles:
            handle.remove()


def expected(socket: Socket, ear: Ear, number: int) -> Tensor:
    """The onion of the projection, then the ends of the sublayer, each with what its own place was given."""
    args, kwargs, _ = ear.calls[id(socket)][number]
    ends = sorted((p for p in socket.plugs if p.site.kind.endswith("_out")), key=lambda p: ORDER[p.attachment.kind])
    inner = sorted((p for p in socket.plugs if p not in ends), key=lambda p: ORDER[p.attachment.kind])
    inputs_ = [first(args, kwargs)]
    for plug in reversed(inner):
        inputs_.append(plug.attachment.before(inputs_[-1]))
    out = socket.base(*((inputs_[-1], *args[1:]) if args else ()), **kwargs)
    y: Tensor = out[0] if isinstance(out, tuple) else out
    for plug, x in zip(inner, reversed(inputs_[:-1]), strict=True):
        y = plug.attachment.after(x, y)
    for plug in ends:
        site, x = plug.site, None
        if plug.attachment.needs_input:
            path = site.residual_path if plug.attachment.reads == "residual" else site.input_path
            x = ear.heard[path][number] if path is not None else first(args, kwargs)
        y = plug.attachment.after(x, y)
    return y


@pytest.mark.parametrize("words", PAIRS)
@pytest.mark.parametrize("arch", EVERY)
def test_each_reads_what_its_own_place_reads(arch: str, words: str) -> None:
    tuned = made(arch, words)
    if tuned is None:
        return
    ear = Ear(tuned)
    batch = inputs(tuned.model)
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    with torch.no_grad():
        tuned.model(**batch)
        ear.off()
        both: set[str] = set()
        for socket in ear.sockets:
            if any(p.site.rows is not None or p.site.expert is not None for p in socket.plugs):
                continue  # a part of a fused layer; no sublayer ends there
            kinds = {p.site.kind for p in socket.plugs}
            ends = {k for k in kinds if k.endswith("_out")}
            both |= ends if kinds - ends else set()
            for number, (_, _, out) in enumerate(ear.calls[id(socket)]):
                found = out[0] if isinstance(out, tuple) else out
                torch.testing.assert_close(found, expected(socket, ear, number), rtol=1e-9, atol=1e-9)
    wanted = {"ffn_out"} if "mam" in words or "adamix" in words or "propetl" in words or "unipelt" in words else None
    if arch in ONE:
        assert both == (ONE[arch] & wanted if wanted else ONE[arch])


@pytest.mark.parametrize("arch", EVERY)
def test_as_two_tunings_they_compute_what_they_compute_as_one(arch: str) -> None:
    words = "lora+parallel_adapter"
    tuned = made(arch, words)
    if tuned is None:
        return
    batch = {k: v.double() if v.is_floating_point() else v for k, v in inputs(tuned.model).items()}
    together = logits(tuned.model, batch)
    values = {n: p.detach().clone() for n, p in tuned.trained().items()}
    sites = tuned.tuning().method.parts()[0].sites  # type: ignore[attr-defined]
    model = tiny(arch)
    for name in ("parallel_adapter", "lora"):
        settings = {k.partition(".")[2]: v for k, v in (SIZES | PAIRS[words]).items() if k.startswith(f"{name}.")}
        if name == "lora":
            settings["sites"] = sites
        apart = attach(model, method(name, settings), name=name, train_head=False)
    widen(model)
    with torch.no_grad():
        for full, parameter in apart.trained().items():
            parameter.copy_(values[full])
    torch.testing.assert_close(logits(model, batch), together, rtol=1e-9, atol=1e-9)
    apart.activate("lora")
    assert (logits(model, batch) - together).abs().max() > 1e-3


@pytest.mark.parametrize("arch", EVERY)
def test_in_rows_of_different_tunings_each_row_is_what_it_is_alone(arch: str) -> None:
    model = tiny(arch)
    tunings = {
        "lows": ("lora", {"rank": 3, "sites": OUTER}),
        "scales": ("ia3", {"inputs": OUTER}),
        "branch": ("parallel_adapter", {"width": 5, "placement": "both"}),
        "mixed": ("lora+parallel_adapter", {"lora.rank": 2, "lora.sites": OUTER, "parallel_adapter.width": 5,
                                            "parallel_adapter.placement": "both"}),
    }  # fmt: skip
    tuned = None
    for name, (words, settings) in tunings.items():
        try:
            tuned = attach(model, method(words, settings), name=name, train_head=False)
        except AnatomyError:
            assert arch not in QUICK
            return  # experts see tokens without their rows
        shake(tuned, 0.1)
        tuned.activate()
    assert tuned is not None
    widen(model)
    names = ["branch", "mixed", None, "lows", "mixed", "scales"]
    batch = {k: v.double() if v.is_floating_point() else v for k, v in inputs(model, batch=len(names)).items()}
    alone = {}
    for name in set(names):
        tuned.activate(*([name] if name else []))
        alone[name] = logits(model, batch)
    tuned.activate()
    for serving in (False, True):
        try:
            with tuned.serving() if serving else torch.no_grad(), tuned.rows(names):
                found = logits(model, batch)
        except CompositionError as error:
            assert arch not in QUICK, str(error)
            return
        for row, name in enumerate(names):
            torch.testing.assert_close(found[row], alone[name][row], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("arch", EVERY)
def test_while_answering_the_end_of_a_sublayer_acts_beside_an_update_of_its_projection(arch: str) -> None:
    tuned = made(arch, "lora+parallel_adapter")
    if tuned is None:
        return
    batch = {k: v.double() if v.is_floating_point() else v for k, v in inputs(tuned.model).items()}
    alone = logits(tuned.model, batch)
    with tuned.serving():
        torch.testing.assert_close(logits(tuned.model, batch), alone, rtol=1e-8, atol=1e-8)
    try:
        with tuned.serving(), tuned.rows(["default"] * 3):
            torch.testing.assert_close(logits(tuned.model, batch), alone, rtol=1e-8, atol=1e-8)
    except CompositionError:
        assert arch not in QUICK


@pytest.mark.parametrize("arch", ["llama", "opt", "bart"])
def test_one_kind_of_attachment_at_both_places_keeps_its_place_in_rows(arch: str) -> None:
    model = tiny(arch)
    for name, outputs in (("projection", ("attn.o",)), ("end", ("attn_out",)), ("again", ("attn.o",))):
        tuned = attach(model, method("ia3", {"outputs": outputs, "inputs": ()}), name=name, train_head=False)
        shake(tuned, 0.3)
        tuned.activate()
    widen(model)
    names = ["projection", "end", None, "again"]
    batch = inputs(model, batch=4)
    alone = {}
    for name in names:
        tuned.activate(*([name] if name else []))
        alone[name] = logits(model, batch)
    tuned.activate()
    with tuned.serving(), tuned.rows(names):
        found = logits(model, batch)
    for row, name in enumerate(names):
        torch.testing.assert_close(found[row], alone[name][row], rtol=1e-8, atol=1e-8)


def test_what_sits_at_a_place_is_not_merged_into_a_layer_that_happens_to_end_there() -> None:
    for arch in ("llama", "bart", "bert"):
        tuned = attach(tiny(arch), "ia3", outputs=("attn_out",), inputs=())
        shake(tuned, 0.1)
        with pytest.raises(CannotMerge, match=r"attn_out.*a place at the end of a sublayer"):
            tuned.merge()


@pytest.mark.parametrize("name", ["update", "train", "forward"])
def test_a_name_that_torch_has_taken_is_refused_before_anything_is_touched(name: str) -> None:
    tuned = attach(tiny("bert"), "lora")
    with pytest.raises(ConfigError, match=f"'{name}': torch's modules have"):
        tuned.add("ia3", name=name)
    assert list(tuned.tunings) == ["default"]
