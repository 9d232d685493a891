"""S1: the syntax tree of every source file is free of what can run code from a file."""

import ast
from pathlib import Path

import pytest

import luthier

SOURCES = Path(next(iter(luthier.__path__)))
UNPICKLER = SOURCES / "trust" / "_unpickle.py"
PROGRAMS = SOURCES / "trust" / "programs.py"
"""What runs programs that a model wrote, of which every piece of syntax was looked at, inside the jail."""
MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle"}


def sins(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, what) for everything in `tree` that has no place in our sources."""
    found = []
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import):
            found += [(line, f"import {a.name}") for a in node.names if a.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            found.append((line, f"from {node.module} import"))
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec"):
                found.append((line, called))
            if called.endswith(("torch.load", "torch.save", "torch.hub.load", "yaml.load", "yaml.load_all")):
                found.append((line, called))
            if called in ("os.system", "os.popen") or called.endswith((".extractall", "numpy.load", "np.load")):
                found.append((line, called))
            for word in node.keywords:
                if word.arg in ("trust_remote_code", "allow_pickle", "shell") and not (
                    isinstance(word.value, ast.Constant) and word.value.value is False
                ):
                    found.append((line, f"{word.arg}="))
                if word.arg == "weights_only":
                    found.append((line, "weights_only="))
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                said = isinstance(key, ast.Constant) and key.value in ("trust_remote_code", "allow_pickle", "shell")
                if said and not (isinstance(value, ast.Constant) and value.value is False):
                    found.append((line, "trust_remote_code in a table"))
    return found


def test_no_source_file_can_run_code_from_a_file() -> None:
    bad = {}
    for path in sorted(SOURCES.rglob("*.py")):
        if path not in (UNPICKLER, PROGRAMS) and (here := sins(ast.parse(path.read_text(encoding="utf-8")))):
            bad[str(path.relative_to(SOURCES))] = here
    assert bad == {}


def test_the_only_unpickler_defines_its_own_lookup_and_never_calls_the_inherited_one() -> None:
    tree = ast.parse(UNPICKLER.read_text(encoding="utf-8"))
    assert [what for _, what in sins(tree)] == ["import pickle"]
    uses = [ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "pickle"]
    assert uses == ["pickle.Unpickler"]
    classes = [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef)]
    (cls,) = [n for n in classes if "pickle.Unpickler" in map(ast.unparse, n.bases)]
    assert {"find_class", "persistent_load"} <= {n.name for n in cls.body if isinstance(n, ast.FunctionDef)}
    assert "super()" not in ast.unparse(cls)


def test_programs_are_run_in_one_place_and_only_what_was_checked() -> None:
    tree = ast.parse(PROGRAMS.read_text(encoding="utf-8"))
    assert sorted(what for _, what in sins(tree)) == ["compile", "exec"]
    (run,) = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "exec"]
    assert ast.unparse(run.args[0]) == "compile(checked(program), '<program>', 'exec')"
    (runner,) = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "runner"]
    assert run in list(ast.walk(runner)), "only the jail's child calls it"
    for path in SOURCES.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert path == PROGRAMS or ("programs.runner" not in text and "import runner" not in text)


def test_only_the_jail_names_the_unpickler() -> None:
    for path in SOURCES.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if path != UNPICKLER and "_unpickle" in text:
            assert path.name == "convert.py" and '"luthier.trust._unpickle:start"' in text


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import joblib",
        "torch.load('x')",
        "torch.load('x', weights_only=True)",
        "AutoModel.from_pretrained(p, trust_remote_code=True)",
        "AutoModel.from_pretrained(p, trust_remote_code=flag)",
        "f(**{'trust_remote_code': True})",
        "eval('1')",
        "exec(code)",
        "yaml.load(text)",
        "subprocess.run('ls', shell=True)",
        "tarfile.open(p).extractall(q)",
        "np.load(p, allow_pickle=True)",
        "os.system('ls')",
    ],
)
def test_the_gate_sees_each_sin(code: str) -> None:
    assert sins(ast.parse(code))
