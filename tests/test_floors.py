"""A room imports only rooms below it: every import is read, those inside functions and under TYPE_CHECKING too."""

import ast
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent / "src" / "luthier"

# Floor by floor. Beside a room, what it may import; nothing else, whatever its floor.
ALLOWED: dict[str, set[str]] = {
    "core": set(),
    "kernels": {"core"},
    "runs": {"core"},
    "trust": {"core"},
    "anatomy": {"core"},
    "samples": {"core", "runs", "trust"},
    "data": {"core", "kernels", "runs", "trust", "samples"},
    "surgery": {"core", "kernels", "runs", "trust", "anatomy"},
    "methods": {"core", "kernels", "anatomy", "surgery"},
    "training": {"core", "kernels", "runs", "anatomy", "data", "surgery"},
    "forecast": {"core", "kernels", "runs", "anatomy", "data", "surgery", "training"},
    "workflow": {
        *("core", "kernels", "runs", "trust", "anatomy", "samples", "data", "surgery", "training", "forecast"),
    },
    "strategies": {"core", "kernels", "runs", "trust", "anatomy", "data", "surgery", "training", "workflow"},
    "comparison": {"core", "runs", "data", "training", "workflow"},
    "asking": {"core", "runs", "trust", "data", "training", "workflow", "comparison"},
    "report": {"core", "runs", "trust", "training", "comparison"},
    "cli": {
        *(
            "core",
            "runs",
            "trust",
            "anatomy",
            "samples",
            "data",
            "surgery",
            "methods",
            "training",
            "forecast",
            "workflow",
        ),
        *("strategies", "comparison", "asking", "report"),
    },
    "testing": {"core", "runs"},  # for tests of any floor; no room may import it
}
FLOORS = [
    "core",
    "kernels runs trust anatomy samples",
    "data surgery",
    "methods training",
    "forecast",
    "workflow",
    "strategies comparison",
    "asking report",
    "cli testing",
]


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0]


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything of ours that a file imports, wherever in the file it does so."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] == "luthier")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import; write the whole name"
            if node.module == "luthier":
                yield from ((node.lineno, f"luthier.{alias.name}") for alias in node.names)
            elif node.module and node.module.startswith("luthier."):
                yield node.lineno, node.module
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "import_module":
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and str(first.value).startswith("luthier."):
                yield node.lineno, str(first.value)


def files_in_rooms() -> list[Path]:
    return sorted(path for path in SOURCE.rglob("*.py") if path.parent != SOURCE)


def test_imports_only_go_down() -> None:
    wrong = []
    for path in files_in_rooms():
        room = room_of(path)
        for line, name in imports_of(path):
            parts = name.split(".")
            # The number of the version is the one thing on the ground that has no room.
            if len(parts) < 2 or parts[1] == "__version__" or parts[1] == room:
                continue
            if parts[1] not in ALLOWED[room]:
                wrong.append(f"{path.relative_to(SOURCE)}:{line}: {room} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_every_folder_has_its_floor_and_no_arrow_goes_up() -> None:
    rooms = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    assert rooms == set(ALLOWED)
    floor = {room: n for n, line in enumerate(FLOORS) for room in line.split()}
    assert set(floor) == set(ALLOWED)
    for room, below in ALLOWED.items():
        for other in below:
            assert floor[other] <= floor[room], f"{room} on floor {floor[room]} may import {other} above it"


def test_the_table_has_no_circle() -> None:
    done: set[str] = set()

    def visit(room: str, path: tuple[str, ...]) -> None:
        assert room not in path, " imports ".join((*path, room))
        if room not in done:
            for other in ALLOWED[room]:
                visit(other, (*path, room))
            done.add(room)

    for room in ALLOWED:
        visit(room, ())


def files_imported(path: Path, source: Path = SOURCE) -> set[Path]:
    """Files of ours that a file imports, wherever in it; of a package, the file that a name is from."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            places = [(node.module or "", name) for name in names]
        else:
            places = [(name, "") for name in names]
        for module, name in places:
            if module.split(".")[0] == "luthier":
                home = source.joinpath(*module.split(".")[1:])
                choices = (home / f"{name}.py", home / name / "__init__.py", home.with_suffix(".py"))
                found |= {next((c for c in choices if c.is_file()), home / "__init__.py")}
    return found - {path}


def circles_in(room: str, source: Path = SOURCE) -> list[str]:
    """Each file of a room that imports itself by way of others in the room, with the shortest such way."""
    files = sorted((source / room).rglob("*.py"))
    imported = {path: files_imported(path, source) & set(files) for path in files}
    found = []
    for start in files:
        ways = [(start,)]
        seen: set[Path] = set()
        while ways:
            way = ways.pop(0)
            for other in sorted(imported[way[-1]] - seen):
                if other == start:
                    found.append(" imports ".join(p.relative_to(source).as_posix() for p in (*way, start)))
                    ways = []
                    break
                seen.add(other)
                ways.append((*way, other))
    return found


def test_the_files_of_a_room_have_no_circle() -> None:
    found = [circle for room in ALLOWED for circle in circles_in(room)]
    assert not found, "\n".join(found)


def test_circles_between_files_are_found_though_they_hide(tmp_path: Path) -> None:
    room = tmp_path / "room"
    room.mkdir()
    (room / "__init__.py").write_text("from luthier.room.a import A\n")
    (room / "a.py").write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from luthier.room import b\n")
    (room / "b.py").write_text("def f():\n    from luthier.room.a import A\n")
    assert circles_in("room", tmp_path) == [
        "room/a.py imports room/b.py imports room/a.py", "room/b.py imports room/a.py imports room/b.py",
    ]  # fmt: skip
    (room / "b.py").write_text("from luthier.room import A\n")  # through the room's own front page
    assert len(circles_in("room", tmp_path)) == 3


def test_nothing_inside_imports_the_front_page() -> None:
    for path in files_in_rooms():
        for line, name in imports_of(path):
            home = SOURCE.joinpath(*name.split(".")[1:])
            assert home.is_dir() or home.with_suffix(".py").is_file(), f"{path}:{line}: {name} is no module of ours"


def test_the_reader_sees_imports_that_hide(tmp_path: Path) -> None:
    hidden = tmp_path / "hidden.py"
    hidden.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from luthier.cli import main\n"
        "def f():\n    import luthier.workflow.run as r\n    from luthier import samples\n"
        "    import_module('luthier.methods.x')\n"
    )
    assert [name for _, name in imports_of(hidden)] == [
        "luthier.cli", "luthier.workflow.run", "luthier.samples", "luthier.methods.x",
    ]  # fmt: skip
