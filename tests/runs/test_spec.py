import dataclasses
from typing import get_args, get_type_hints

import pytest

from luthier.core import ConfigError, UnknownName, build, fields_of, plain
from luthier.runs import spec as module
from luthier.runs.spec import BatchSpec, DataSpec, EvalSpec, OptimSpec, RunSpec
from luthier.runs.spec_changes import RESUME, changes, leaves

FULL = RunSpec(
    model="sample:minilm-l6",
    data=DataSpec(source="a.csv", test="b.csv", text="question", label="kind", strict=True),
    task="classification",
    method="lora+prefix_tuning",
    settings={"lora.rank": 16, "lora.sites": ["attn.q", "attn.v"], "prefix_tuning.length": 7},
    optim=OptimSpec(lr=1e-3, schedule="cosine", betas=(0.9, 0.95)),
    epochs=2.5,
    batch=BatchSpec(size=8, tokens=512),
    eval=EvalSpec(every=10, patience=3),
    seed=7,
    out="runs/x",
)
SMALL = RunSpec(model="m", data=DataSpec(source="a.csv"))


@pytest.mark.parametrize("spec", [SMALL, FULL])
def test_a_spec_survives_a_toml_file(tmp_path, spec):
    path = tmp_path / "spec.toml"
    path.write_text(spec.to_toml(), encoding="utf-8")
    assert RunSpec.from_toml(path) == spec
    assert RunSpec.from_toml(path).digest() == spec.digest()
    assert build(RunSpec, plain(spec)) == spec


def spec_classes():
    return [c for c in vars(module).values() if isinstance(c, type) and c.__name__.endswith("Spec")]


def test_a_field_that_may_be_left_out_is_left_out_by_default():
    # TOML has no null: a field with another default could not say "nothing" in a file.
    wrong = [
        f"{cls.__name__}.{f.name}"
        for cls in spec_classes()
        for f in fields_of(cls)
        if type(None) in get_args(f.type) and f.default is not None
    ]
    assert len(spec_classes()) == 6
    assert not wrong


def test_every_field_says_what_it_means():
    assert [f"{cls.__name__}.{f.name}" for cls in spec_classes() for f in fields_of(cls) if not f.meaning] == []


def test_every_field_has_a_resume_rule_and_no_rule_is_left_over():
    assert set(RESUME) == set(leaves(FULL))
    assert {RESUME[k] for k in RESUME} == {"exact", "apply", "boundary"}


def test_changes_names_each_field_that_differs_with_its_rule():
    new = dataclasses.replace(
        FULL, seed=8, optim=dataclasses.replace(FULL.optim, lr=2e-3), batch=BatchSpec(size=4, tokens=512)
    )
    assert [(c.field, c.old, c.new, c.rule) for c in changes(FULL, new)] == [
        ("optim.lr", 1e-3, 2e-3, "apply"),
        ("batch.size", 8, 4, "boundary"),
        ("seed", 7, 8, "exact"),
    ]
    assert changes(FULL, FULL) == []


def changed(value, hint):
    """Another value of the same type."""
    literals = [a for part in get_args(hint) for a in (part, *get_args(part)) if isinstance(a, str)]
    if others := [a for a in literals if a != value]:
        return others[0]
    if bool in get_args(hint) and isinstance(value, str):
        return True
    numbers = [a for a in get_args(hint) if a in (int, float)]
    if value is None and numbers:
        return numbers[0](1)
    if isinstance(value, float):
        return value / 2 or 0.25
    return {bool: lambda: not value, dict: lambda: {"rank": 3}, list: lambda: [0.5, 0.25]}.get(
        type(value), lambda: f"other{value}" if isinstance(value, str) or value is None else value + 1
    )()


def test_a_change_of_any_single_field_is_seen():
    hints = {**get_type_hints(RunSpec)}
    for name in RESUME:
        outer, _, inner = name.partition(".")
        part = getattr(FULL, outer)
        if name == "data.fold":  # which stands in place of test rows
            new = dataclasses.replace(FULL, data=dataclasses.replace(FULL.data, test=None, fold="2/5"))
        elif inner:
            value = changed(plain(getattr(part, inner)), get_type_hints(type(part))[inner])
            new = dataclasses.replace(FULL, **{outer: dataclasses.replace(part, **{inner: value})})
        elif name == "steps":
            new = dataclasses.replace(FULL, epochs=None, steps=4)
        elif name == "chosen":
            new = dataclasses.replace(FULL, chosen=("epochs",))
        else:
            new = dataclasses.replace(FULL, **{outer: changed(plain(part), hints[outer])})
        seen = {c.field for c in changes(FULL, new)}
        assert name in seen, name
        assert (new.digest() != FULL.digest()) == (name not in ("out", "chosen", "force")), name


def test_steps_follow_from_epochs_or_are_given():
    assert RunSpec(model="m", data=DataSpec(source="a")).total_steps(10) == 30
    assert RunSpec(model="m", data=DataSpec(source="a"), epochs=0.01).total_steps(10) == 1
    assert RunSpec(model="m", data=DataSpec(source="a"), steps=4).total_steps(10) == 4
    with pytest.raises(ConfigError, match="give one of the two"):
        RunSpec(model="m", data=DataSpec(source="a"), epochs=1.0, steps=4)


def written(tmp_path, text):
    path = tmp_path / "spec.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ('model = "m"\n[data]\nsource = "a"\n[optim]\nlr = "fast"', ConfigError, ["run.optim.lr", "'fast'"]),
        ('model = "m"\n[data]\nsource = "a"\n[optim]\nlr = -1.0', ConfigError, ["run.optim.lr", "above 0", "-1"]),
        ('model = "m"\n[data]\nsource = "a"\n[batch]\nsize = 0', ConfigError, ["run.batch.size", "at least 1"]),
        ('model = "m"\nsede = 3\n[data]\nsource = "a"', UnknownName, ["'sede'", "seed"]),
        ('model = "m"\n[data]\nsource = "a"\nlable = "x"', UnknownName, ["'lable'", "'label'"]),
        ('model = "m"\nprecision = "bf61"\n[data]\nsource = "a"', ConfigError, ["run.precision", "'bf16'"]),
        ('model = "m"\ntask = "clasification"\n[data]\nsource = "a"', ConfigError, ["run.task", "'classification'"]),
        ('model = "m"', ConfigError, ["run.data", "missing"]),
        ('model = "m"\nseed = =', ConfigError, ["not valid TOML", "line 2"]),
        ('model = "m"\nepochs = 1.0\nsteps = 3\n[data]\nsource = "a"', ConfigError, ["give one of the two"]),
        ('model = "m"\n[data]\nsource = "a.csv"\ntest = "a.csv"', ConfigError, ["data.test", "'a.csv'"]),
        ('model = "m"\nseed = nan\n[data]\nsource = "a"', ConfigError, ["run.seed"]),
    ],
)
def test_a_bad_spec_file_is_answered_with_file_and_field(tmp_path, text, kind, words):
    path = written(tmp_path, text)
    with pytest.raises(kind) as caught:
        RunSpec.from_toml(path)
    assert str(path) in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_all_complaints_of_a_file_come_together(tmp_path):
    path = written(tmp_path, 'model = 3\nseed = -1\n[data]\nsource = "a"\n[optim]\nwarmup = 2.0')
    with pytest.raises(ConfigError) as caught:
        RunSpec.from_toml(path)
    for field in ("run.model", "run.seed", "run.optim.warmup"):
        assert field in str(caught.value)


def test_a_spec_file_that_is_missing_or_no_text_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"gone\.toml: cannot be read"):
        RunSpec.from_toml(tmp_path / "gone.toml")
    (tmp_path / "latin.toml").write_bytes(b'model = "caf\xe9"')
    with pytest.raises(ConfigError, match=r"latin\.toml: byte 12 is not UTF-8"):
        RunSpec.from_toml(tmp_path / "latin.toml")


def test_the_spec_needs_no_torch():
    import subprocess
    import sys

    code = (
        "import sys, importlib.util as u; s = u.spec_from_file_location('s', sys.argv[1]); m = u.module_from_spec(s);"
        "sys.modules['s'] = m; s.loader.exec_module(m);"
        "assert m.RunSpec(model='m', data=m.DataSpec(source='a')).seed == 0; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, module.__file__], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
