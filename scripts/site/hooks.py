"""What mkdocs asks us while it builds the site: pages that are made, not written, and links that leave the folder docs.

The home page is the README, the examples are the files of `examples/`, and each method has a page from its own file:
equation, drawing, when to use it, settings. Nothing here reaches out to a network.
"""

import ast
import os
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts" / "site"), str(ROOT / "src")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pages  # noqa: E402  # beside this file
from mkdocs.structure.files import File  # noqa: E402

# Files of the root that are pages of the site; whatever else lies outside of docs/ is named without a link.
FROM_ROOT = {"CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md", "CHANGELOG.md": "changelog.md"}
FOLDERS = {"examples": "examples.md", "docs/decisions": "decisions/index.md"}
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#]+)(#[^)]*)?\)")


def on_config(config: Any) -> Any:
    """Fill the navigation in with the methods, family by family, and the decisions."""
    unnamed = pages.not_in(config["nav"])
    for section in config["nav"]:
        for title, entries in section.items():
            if title == "Methods":
                entries += pages.method_navigation()
            if title == "Strategies":
                entries += [f"strategies/{name}.md" for name in [*pages.STRATEGIES.names(), *pages.WAYS.names()]]
            if title == "Internals":
                entries += unnamed
                entries.append({"Decisions": ["decisions/index.md", *pages.decisions()]})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made from elsewhere."""
    made = {
        "index.md": _home((ROOT / "README.md").read_text(encoding="utf-8")),
        "examples.md": _examples(),
        "strategies/index.md": pages.strategies_index(),
        **{
            f"strategies/{name}.md": pages.strategy_page(name)
            for name in [*pages.STRATEGIES.names(), *pages.WAYS.names()]
        },
        "cli.md": pages.command_line(),
        "decisions/index.md": pages.decisions_index(),
    }
    for source, target in FROM_ROOT.items():
        made[target] = _relinked((ROOT / source).read_text(encoding="utf-8"), ROOT, "")
    for uri, content in made.items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """A method's page is made anew for the site; on all others links that lead out of docs/ are mended."""
    uri = page.file.src_uri
    if uri.startswith("methods/") and uri != "methods/README.md":
        return pages.method_page(Path(uri).stem)
    if page.file.generated_by is not None:
        return markdown
    return _relinked(markdown, ROOT / "docs" / Path(uri).parent, uri)


def _home(readme: str) -> str:
    return _relinked(readme, ROOT, "")


def _relinked(markdown: str, folder: Path, uri: str) -> str:
    """Links as the site has them; a link to what is not on the site becomes its words."""

    def mend(link: re.Match[str]) -> str:
        target = (folder / link[1]).resolve()
        anchor = link[2] or ""
        within = target.relative_to(ROOT).as_posix() if target.is_relative_to(ROOT) else ""
        known = FROM_ROOT.get(within) or FOLDERS.get(within.rstrip("/"))
        if known is None and within.startswith("docs/") and target.exists():
            known = within.removeprefix("docs/")
        if known is None:
            return "]"
        here = Path(uri).parent.as_posix()
        return f"]({os.path.relpath(known, here)}{anchor})"

    # A link that is no link any more loses its brackets too.
    return (
        re.sub(r"(?<!!)\[([^\]\[]*)\](?![(\[:])", r"\1", LINK.sub(mend, markdown))
        if LINK.search(markdown)
        else markdown
    )


def _examples() -> str:
    lines = ["# Examples", "", "Each is a file of `examples/` that runs as it stands; the tests run all of them.", ""]
    for path in sorted((ROOT / "examples").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        title = str(ast.get_docstring(tree)).split("\n", 1)[0]
        words = path.stem.split("_", 1)[1].replace("_", " ")
        lines += [
            f"## {words[0].upper()}{words[1:]}",
            "",
            title,
            "",
            f'```python title="examples/{path.name}"',
            text.rstrip(),
        ]
        lines += ["```", ""]
    return "\n".join(lines)
