"""Every method whose files peft reads, beside peft: the same places and sizes, by the file that we would write."""

from dataclasses import replace

from benchmarks._suite import Case, Contestant

__all__ = ["cases"]

SETTINGS: dict[str, dict[str, object]] = {
    "boft": {"factors": 1},  # peft takes one where its CUDA code is missing
    "cartridge": {"words": [], "still": 0},
    "llama_adapter": {"gate": "layer"},
    "trainable_tokens": {"tokens": [46, 9, 80]},
}
"""What a method needs to be given, or what peft can hold of it; both sides get it."""
OF_A_MODEL: dict[tuple[str, str], dict[str, object]] = {
    ("decoder", "c3a"): {"block": 96},  # 128 does not divide its 576
    ("decoder", "vblora"): {"length": 96},
    # A thousand choices compared after the last step are no step.
    ("decoder", "glora"): {"population": 2, "parents": 2, "generations": 0},
    ("decoder", "cpt"): {"words": [5, 9, 17, 30, 6, 11, 23, 31], "types": [1, 2, 3, 4, 5, 6, 7, 8]},
}
OF_TASKS = ("mpt", "poly")
"""Their rows name a task, which the rows here do not."""
NOT_HERE = {
    ("encoder", "cartridge"), ("encoder", "llama_adapter"), ("encoder", "trainable_tokens"), ("encoder", "p_tuning"),
    ("encoder", "prefix_tuning"), ("encoder", "prompt_tuning"), ("encoder", "shadow"), ("encoder", "cpt"),
}  # fmt: skip
"""Methods of decoders, and those that peft cannot put before an encoder's classifier."""


def cases(quick: bool) -> list[Case]:
    """One case for each method and model: ours, and peft in bf16 with the faster attention."""
    from luthier.surgery.peft_files import forms

    names = ["lora", "dora", "rslora", "pissa", "ia3", *sorted(name for name, _ in forms().values())]
    names = [name for name in names if name not in OF_TASKS]
    models = (
        ("encoder", "minilm-l6 + {} on trec6, batch 32", {"steps": 8 if quick else 24}, "steady_rows_per_second"),
        ("decoder", "smollm2-135m + {}, 4 x 256 tokens a step", {"batch": 4, "steps": 4}, "steady_tokens_per_second"),
    )
    return [
        Case(
            f"shared-{model}-{name}", title.format(name), tuple(_given(one, name) for one in _both(model, work)),
            repeats=1 if quick else 3, unit=unit,
        )
        for model, title, work, unit in (models[:1] if quick else models)
        for name in (("ia3", "vera") if quick else names) if (model, name) not in NOT_HERE
    ]  # fmt: skip


def _both(model: str, work: dict[str, object]) -> tuple[Contestant, ...]:
    # glibc keeps what is freed on both sides: luthier asks for that by itself.
    keeping = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(64 << 30)}
    theirs: dict[str, object] = {"bf16": True, "group": True} if model == "encoder" else {"weights": "bf16"}
    return (
        Contestant("luthier", "_ours", model, {**work}),
        Contestant(
            "peft, bf16, eager, malloc keeps", "_peers", model, {**work, **theirs, "attention": "eager"}, keeping
        ),
    )


def _given(one: Contestant, name: str) -> Contestant:
    settings = SETTINGS.get(name, {}) | OF_A_MODEL.get((one.function, name), {})
    return replace(one, arguments={**one.arguments, "method": name, "settings": settings})
