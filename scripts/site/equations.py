"""The equations of a method's page as MathML, which browsers draw by themselves: no script, no font, no server.

A page writes its equations in an indented block, as one would type them: `y = x W^T + b_v + (alpha / rank) B A x`, with
the shapes behind, four blanks apart. What stands there is read token by token; words are left as words.
"""

import re
from html import escape

__all__ = ["blocks", "mathml"]

GREEK = {
    "alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ", "theta": "θ", "lambda": "λ", "sigma": "σ", "mu": "μ",
    "eta": "η", "rho": "ρ", "tau": "τ", "epsilon": "ε", "phi": "φ", "Delta": "Δ", "Sigma": "Σ",
}  # fmt: skip
SIGNS = {"*": "⊙", "<-": "←", "->": "→", "-": "−", "...": "…", "<=": "≤", ">=": "≥"}
TOKEN = re.compile(
    r"\s+|<-|->|<=|>=|\.\.\.|\d+(?:\.\d+)?|[^\W\d_]+(?:_(?:[^\W_]+))?|\^(?:[^\W_]+|-?\d+)|[^\w\s]|_", re.UNICODE
)
PLAIN = re.compile(r"[A-Za-z]{4,}")  # functions and tensors have short names; a phrase has several long words


def blocks(page: str) -> list[list[str]]:
    """The indented blocks of a page, each as its lines without the indentation."""
    found: list[list[str]] = []
    inside = False
    for line in page.splitlines():
        if line.startswith("    ") and line.strip():
            if not inside:
                found.append([])
            found[-1].append(line.strip())
            inside = True
        elif line.strip():
            inside = False
    return found


def mathml(lines: list[str]) -> str:
    """One block as HTML: equations below each other, and what else stands behind each as a smaller line."""
    rows = []
    for line in lines:
        first, *rest = [piece for piece in re.split(r" {4,}", line) if piece]
        for kind, pieces in (
            ("equation", [first, *(p for p in rest if _is_equation(p))]),
            ("where", [p for p in rest if not _is_equation(p)]),
        ):
            if pieces:
                rows.append(f'<div class="{kind}">' + "".join(f"<span>{_piece(p)}</span>" for p in pieces) + "</div>")
    return "\n".join(rows)


def _piece(text: str) -> str:
    """One equation, one shape (`A: (rank, d_in)`), or a remark in words."""
    name, colon, after = text.partition(": ")
    if colon and len(name) < 30:
        value = _words(after) if _is_prose(after) else _math(after)
        return f"{_math(name)}: {value}"
    return _words(text) if _is_prose(text) else _math(text)


def _is_equation(text: str) -> bool:
    return ("=" in text or "<-" in text) and ":" not in text and "," not in text.partition("=")[0]


def _is_prose(text: str) -> bool:
    return "=" not in text and len(PLAIN.findall(text)) >= 2


def _words(text: str) -> str:
    return f"<span>{escape(text)}</span>"


def _math(text: str) -> str:
    atoms: list[str] = []
    apart = False
    for token in TOKEN.findall(text):
        if token.isspace():
            apart = True
            continue
        atom = _atom(token)
        if len(token) > 1 and token.startswith("^") and atoms:
            atoms[-1] = f"<msup>{atoms[-1]}{_atom(token[1:])}</msup>"
        elif apart and atoms and not atoms[-1].startswith("<mo>") and not atom.startswith("<mo>"):
            # A product is written with a blank, which mathematics would swallow.
            atoms += ['<mspace width="0.22em"/>', atom]
        else:
            atoms.append(atom)
        apart = False
    return "<math><mrow>" + "".join(atoms) + "</mrow></math>"


def _atom(token: str) -> str:
    if re.fullmatch(r"-?\d+(\.\d+)?", token):
        return f"<mn>{token}</mn>"
    name, low, index = token.partition("_")
    if low and name and index:
        return f"<msub>{_name(name)}{_atom(index)}</msub>"
    return _name(token) if token[0].isalpha() else f"<mo>{escape(SIGNS.get(token, token))}</mo>"


def _name(word: str) -> str:
    return f"<mi>{GREEK.get(word, word)}</mi>"
