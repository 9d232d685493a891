"""What is measured: the groups of cases, at full length and in a few minutes."""

import importlib.util
from collections.abc import Callable
from dataclasses import replace

from benchmarks import _machine, _shared, _strategies
from benchmarks._suite import Case, Contestant

__all__ = ["GROUPS", "SHARED", "plan"]

SHARED = ("lora", "dora", "ia3", "adalora", "prefix_tuning", "prompt_tuning", "full")
"""methods that peft has too; full fine-tuning is the Trainer's alone"""

NEEDED: dict[tuple[str, str], dict[str, object]] = {("decoder", "bitfit"): {"add_missing_biases": True}}
"""settings without which a method refuses a model: a Llama has no biases"""
REFUSED = {("decoder", "head_only")}
"""what a method is not for: a language model has no new head"""

STEADY_ROWS, STEADY_TOKENS = "steady_rows_per_second", "steady_tokens_per_second"

KEEPING = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(64 << 30)}
"""glibc keeps what is freed; luthier asks for that by itself, a user of peft has to know of it"""

LUTHIER = Contestant("luthier", "_ours", "encoder")
ENCODER_PEERS = (
    Contestant("peft, defaults", "_peers", "encoder"),
    Contestant("peft, bf16, grouped, sdpa", "_peers", "encoder", {"bf16": True, "group": True, "attention": "sdpa"}),
    Contestant("peft, bf16, grouped, eager", "_peers", "encoder", {"bf16": True, "group": True, "attention": "eager"}),
    Contestant(
        "peft, bf16, grouped, eager, malloc keeps",
        "_peers",
        "encoder",
        {"bf16": True, "group": True, "attention": "eager"},
        KEEPING,
    ),
)
DECODER_PEERS = (
    Contestant("peft, fp32", "_peers", "decoder"),
    Contestant("peft, bf16 autocast", "_peers", "decoder", {"bf16": True}),
    Contestant("peft, bf16 weights", "_peers", "decoder", {"weights": "bf16"}),
    Contestant("peft, bf16 weights, eager", "_peers", "decoder", {"weights": "bf16", "attention": "eager"}),
    Contestant(
        "peft, bf16 weights, eager, malloc keeps",
        "_peers",
        "decoder",
        {"weights": "bf16", "attention": "eager"},
        KEEPING,
    ),
)


# Training bf16 weights in bf16 would be other arithmetic: most updates round away.
FULL_DECODER_PEERS = (
    DECODER_PEERS[1],
    replace(DECODER_PEERS[1], name="peft, bf16 autocast, malloc keeps", environment=KEEPING),
)


def _with(contestants: tuple[Contestant, ...], **arguments: object) -> tuple[Contestant, ...]:
    return tuple(replace(c, arguments={**c.arguments, **arguments}) for c in contestants)


def equal(quick: bool) -> list[Case]:
    """Same start, same rows: the same losses."""
    steps = 8 if quick else 40
    return [
        Case(
            f"equal-{name}",
            f"minilm-l6 + LoRA, {steps} steps from the same numbers over the same rows, {name}",
            (Contestant("luthier and peft", "_equal", "encoder", {"steps": steps, "precision": name}),),
            repeats=1,
            unit="largest_difference",
            higher_is_better=False,
        )
        for name in (("fp32",) if quick else ("fp32", "bf16"))
    ]


def encoder(quick: bool) -> list[Case]:
    """minilm-l6 + LoRA, from rows to the saved adapter."""
    cases = []
    for sample in ("trec6",) if quick else ("trec6", "movie-snippets"):
        extra: dict[str, object] = {"sample": sample, "steps": 30 if quick else None if sample == "trec6" else 135}
        peers = (*ENCODER_PEERS[:2],) if quick else ENCODER_PEERS
        cases.append(
            Case(
                f"encoder-{sample}",
                f"minilm-l6 + LoRA r=8 (q, v) on {sample}, batch 32, {extra['steps'] or 'one epoch of'} steps",
                _with((LUTHIER, *peers), **extra),
                unit=STEADY_ROWS,
            )
        )
    return cases


def accuracy(quick: bool) -> list[Case]:
    """Accuracy over seeds, each side as it runs by itself: bf16, its own order of rows, its own dropout."""
    if quick:
        return []
    return [
        Case(
            "accuracy",
            "minilm-l6 + LoRA r=8 on trec6, three epochs of 405 steps, accuracy of the 1,076 test rows, seeds 0 to 4",
            tuple(
                replace(c, arguments={**c.arguments, "steps": 405, "test": True, "lr": 2e-3, "seed": "turn"})
                for c in (LUTHIER, ENCODER_PEERS[1])
            ),
            repeats=5,
            unit="accuracy",
        )
    ]


def decoder(quick: bool) -> list[Case]:
    """smollm2-135m + LoRA."""
    size: dict[str, object] = {"batch": 2, "steps": 3} if quick else {"batch": 8, "steps": 6}
    peers = DECODER_PEERS[:3] if quick else DECODER_PEERS
    ours = Contestant("luthier", "_ours", "decoder")
    return [
        Case(
            f"decoder-{name}",
            f"smollm2-135m + LoRA r=8 (q, v), {size['batch']} x 256 tokens a step, {words} supervised",
            _with((ours, *(peers if share == 1.0 else (peers[0], *peers[3:]))), **size, supervised=share),
            repeats=2 if quick else 3,
            unit=STEADY_TOKENS,
        )
        for name, words, share in (
            (("all", "all", 1.0),) if quick else (("all", "all", 1.0), ("third", "a third", 1 / 3))
        )
    ]


def methods(quick: bool) -> list[Case]:
    """Every method that peft has too, each at its defaults, against peft in bf16."""
    cases = []
    for method in ("dora", "prompt_tuning") if quick else SHARED:
        cases.append(
            Case(
                f"methods-encoder-{method}",
                f"minilm-l6 + {method} on trec6, batch 32",
                _with(
                    (LUTHIER, *(ENCODER_PEERS[1:2] if quick else ENCODER_PEERS[2:])),
                    method=method,
                    steps=8 if quick else 60,
                ),
                repeats=1 if quick else 3,
                unit=STEADY_ROWS,
            )
        )
        if not quick:
            cases.append(
                Case(
                    f"methods-decoder-{method}",
                    f"smollm2-135m + {method}, 4 x 256 tokens a step, all supervised",
                    _with(
                        (
                            Contestant("luthier", "_ours", "decoder"),
                            *(DECODER_PEERS[3:] if method != "full" else FULL_DECODER_PEERS),
                        ),
                        method=method,
                        batch=4,
                        steps=5,
                    ),
                    unit=STEADY_TOKENS,
                )
            )
    return cases


def sizes(quick: bool) -> list[Case]:
    """LoRA on other models, batches and lengths, against peft in bf16."""
    if quick:
        return []
    ours = Contestant("luthier", "_ours", "decoder")
    encoders = (
        ("mpnet-base", "encoder_large", 32, 24),
        ("minilm-l6", "encoder", 8, 120),
        ("minilm-l6", "encoder", 128, 24),
    )
    decoders = (
        ("smollm2-135m", "decoder", 1, 128),
        ("smollm2-135m", "decoder", 2, 1024),
        ("smollm2-135m", "decoder", 32, 64),
        ("a random Llama, 8 x 512", "llama", 8, 256),
    )
    return [
        *(
            Case(
                f"sizes-{model}-{batch}",
                f"{name} + LoRA r=8 (q, v) on trec6, batch {batch}",
                # MPNet has no attention but its own in the library.
                _with((LUTHIER, *ENCODER_PEERS[2 if "mpnet" in name else 1 :]), model=model, batch=batch, steps=steps),
                unit=STEADY_ROWS,
            )
            for name, model, batch, steps in encoders
        ),
        *(
            Case(
                f"sizes-{model}-{batch}-{length}",
                f"{name} + LoRA r=8 (q, v), {batch} x {length} tokens a step, all supervised",
                _with((ours, *DECODER_PEERS[3:]), model=model, batch=batch, length=length, steps=5),
                unit=STEADY_TOKENS,
            )
            for name, model, batch, length in decoders
        ),
    ]


def own(quick: bool) -> list[Case]:
    """Every method of the catalogue against our LoRA."""
    if quick:
        return []
    from luthier.surgery import METHODS

    names = ["lora", *(n for n in METHODS.names() if n != "lora")]
    return [
        Case(
            f"own-{name}",
            title,
            tuple(
                Contestant(m, "_ours", name, {**arguments, "method": m, "settings": NEEDED.get((name, m), {})})
                for m in names
                if (name, m) not in REFUSED
            ),
            unit=unit,
        )
        for name, title, arguments, unit in (
            ("encoder", "minilm-l6 on trec6, batch 32, every method at its defaults", {"steps": 40}, STEADY_ROWS),
            ("decoder", "smollm2-135m, 4 x 256 tokens a step, every method", {"batch": 4, "steps": 4}, STEADY_TOKENS),
        )
    ]


def inference(quick: bool) -> list[Case]:
    """The base, LoRA beside it, LoRA folded in; and as many LoRA tunings as rows."""
    repeats = 10 if quick else 50
    cases = [
        Case(
            f"inference-{model}-{batch}",
            f"{'minilm-l6' if model == 'encoder' else 'smollm2-135m, a prompt'}: batch {batch} x {length} tokens, bf16",
            (
                Contestant(
                    "one process",
                    "_inference",
                    "forward",
                    {"model": model, "batch": batch, "length": length, "repeats": repeats},
                ),
            ),
            repeats=1 if quick else 3,
            unit="unmerged_over_base",
            higher_is_better=False,
        )
        for model, batch, length in (
            (("encoder", 1, 32), ("encoder", 32, 32))
            if quick
            else (("encoder", 1, 32), ("encoder", 32, 32), ("decoder", 1, 128), ("decoder", 32, 32))
        )
    ]
    rows = [
        Case(
            f"inference-rows-{model}",
            f"{'minilm-l6' if model == 'encoder' else 'smollm2-135m, a prompt'}: 32 x 32 tokens, bf16, 32 LoRA tunings",
            (Contestant("one process", "_inference", "many", {"model": model, "repeats": turns}),),
            repeats=1 if quick else 3,
            unit="different_over_one",
            higher_is_better=False,
        )
        # A pass of the decoder takes half a second, and five kinds of it take turns.
        for model, turns in ((("encoder", repeats),) if quick else (("encoder", repeats), ("decoder", 10)))
    ]
    return [*cases, *rows]


def growth(quick: bool) -> list[Case]:
    """Step time against size, and the start against rows."""
    kinds = ("tokens",) if quick else ("tokens", "length", "layers", "rank", "tunings")
    cases = [
        Case(
            f"growth-{kind}",
            "a Llama-shaped random model of width 256, bf16, LoRA r=8 (q, v)",
            (Contestant("luthier", "_growth", kind, {"repeats": 4} if quick else {}),),
            repeats=1 if quick else 3,
            unit="seconds",
            higher_is_better=False,
        )
        for kind in kinds
    ]
    counts = (2_000, 10_000) if quick else (10_000, 100_000, 1_000_000)
    return [
        *cases,
        Case(
            "growth-rows",
            "seconds to the end of the first step of minilm-l6 + LoRA, generated rows of 9 words",
            tuple(Contestant(f"{n:,} rows", "_growth", "rows", {"n": n}) for n in counts),
            repeats=1 if quick else 3,
            unit="again_first_step_seconds",
            higher_is_better=False,
        ),
    ]


def gpu(quick: bool) -> list[Case]:
    """Models of billions of numbers, where there is a GPU: none of this can be measured without one."""
    if quick or not _machine.gpus():
        return []
    peers = [
        Contestant("peft, bf16 weights", "_peers", "decoder", {"weights": "bf16"}),
        Contestant("peft, bf16 autocast", "_peers", "decoder", {"weights": "bf16", "bf16": True}),
    ]
    if importlib.util.find_spec("liger_kernel") is not None:
        peers.append(
            Contestant("peft, bf16 weights, Liger kernels", "_peers", "decoder", {"weights": "bf16", "liger": True})
        )
    return [
        Case(
            f"gpu-{model}-{words.replace(' ', '-')}",
            f"a random {model} + LoRA r=8 (q, v), {batch} x {length} tokens a step, {words} supervised",
            _with(
                (Contestant("luthier", "_ours", "decoder"), *peers),
                model=model,
                batch=batch,
                length=length,
                steps=12,
                supervised=share,
            ),
            unit=STEADY_TOKENS,
        )
        for model, batch, length in (("llama-1b", 8, 1024), ("llama-8b", 4, 1024))
        for words, share in (("all", 1.0), ("a third", 1 / 3))
    ]


def compiled(quick: bool) -> list[Case]:
    """`torch.compile` over the plain computation, and our own functions."""
    if quick:
        return []
    ways = (
        ("luthier's functions", "ours", None),
        ("plain, eager attention", "plain", "eager"),
        ("torch.compile, eager attention", "compiled", "eager"),
    )
    works: tuple[tuple[str, str, dict[str, object]], ...] = (
        ("encoder", "minilm-l6, 32 x 12 tokens", {"batch": 32, "lengths": [12], "turns": 40}),
        ("encoder", "minilm-l6, 32 rows of 8 to 40 tokens", {"batch": 32, "lengths": [8, 12, 17, 40], "turns": 10}),
        ("decoder", "smollm2-135m, 8 x 256 tokens", {"batch": 8, "lengths": [256], "turns": 3}),
    )
    return [
        Case(
            f"compiled-{number}",
            f"{title}, steps of LoRA r=8 (q, v)",
            tuple(
                Contestant(name, "_compiled", "steps", {"model": model, "how": how, "attention": attention, **work})
                for name, how, attention in ways
            ),
            unit="step_seconds",
            higher_is_better=False,
        )
        for number, (model, title, work) in enumerate(works)
    ]


def floor(quick: bool) -> list[Case]:
    """The matrix products alone."""
    size: dict[str, object] = {"batch": 2} if quick else {"batch": 8}
    return [
        Case(
            "floor-encoder-trec6",
            "the products of one epoch of minilm-l6 + LoRA on trec6, batch 32, alone",
            (Contestant("products", "_floor", "encoder", {"repeats": 1 if quick else 3}),),
            repeats=1 if quick else 3,
            unit=STEADY_ROWS,
        ),
        *(
            Case(
                f"floor-decoder-{name}",
                f"the products of a step of smollm2-135m + LoRA, {size['batch']} x 256 tokens, {name} supervised",
                (Contestant("products", "_floor", "decoder", {**size, "supervised": share}),),
                repeats=1 if quick else 3,
                unit=STEADY_TOKENS,
            )
            for name, share in ((("all", 1.0),) if quick else (("all", 1.0), ("third", 1 / 3)))
        ),
    ]


GROUPS: dict[str, Callable[[bool], list[Case]]] = {
    "equal": equal,
    "floor": floor,
    "encoder": encoder,
    "decoder": decoder,
    "inference": inference,
    "growth": growth,
    "sizes": sizes,
    "methods": methods,
    "shared": _shared.cases,
    "own": own,
    "strategies": _strategies.cases,
    "compiled": compiled,
    "gpu": gpu,
    "accuracy": accuracy,
}


def plan(quick: bool, only: tuple[str, ...] = ()) -> dict[str, list[Case]]:
    """The cases of each group that has any, in the order in which they are run."""
    found = {name: make(quick) for name, make in GROUPS.items() if not only or name in only}
    return {name: cases for name, cases in found.items() if cases}
