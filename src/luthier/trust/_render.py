"""Chat templates, in the child process. Nothing here runs in the parent.

The environment offers what the templates of published models use: `raise_exception`, `strftime_now` (a fixed day),
`tojson`, loop controls, and `{% generation %}`, whose text is reported as spans of characters.
"""

import datetime
import json
import re
import secrets
from collections.abc import Callable
from typing import Any

from jinja2 import TemplateSyntaxError, UndefinedError, meta, nodes
from jinja2.exceptions import SecurityError, TemplateRuntimeError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from luthier.core.errors import DataError, ModelError, Refused

__all__ = ["start"]

# Around the text of {% generation %}. The number is drawn per process, so that no row can forge the sign.
_SIGN = f"\ue000{secrets.token_hex(8)}"
_OPEN, _CLOSE = _SIGN + "<", _SIGN + ">"


class _Raised(Exception):
    """The template called raise_exception."""


class _Generation(Extension):
    tags = {"generation"}  # noqa: RUF012  # the name and type that jinja2 asks for

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Macro) -> str:
        return _OPEN + str(caller()) + _CLOSE


class _Environment(ImmutableSandboxedEnvironment):
    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        # jinja2 would go on with an undefined value until it is used; a template that reaches for this is refused.
        raise SecurityError(f"it reaches for {attribute!r} of {type(obj).__name__!r}")


def _environment(today: datetime.date) -> _Environment:
    def raise_exception(message: object) -> None:
        raise _Raised(str(message))

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        if indent is not None and not 0 <= indent <= 16:
            raise SecurityError(f"it indents JSON by {indent}")
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(form: str) -> str:
        if len(form) > 100 or re.search(r"%[^a-zA-Z%]", form):  # %999999999d pads
            raise SecurityError(f"it formats a date with {form[:40]!r}")
        return datetime.datetime(today.year, today.month, today.day).strftime(form)

    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals.pop("lipsum")  # as much text as one asks for
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


def _inspect(environment: _Environment, template: str) -> dict[str, Any]:
    tree = environment.parse(template)
    for node in tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
        raise Refused(
            f"chat template:{node.lineno}: loads another template; a chat template stands alone. Do not use it."
        )
    for constant in tree.find_all(nodes.Const):
        if isinstance(constant.value, str) and (found := re.search(r"__\w{1,40}__", constant.value)):
            raise Refused(
                f"chat template:{constant.lineno}: reaches for {found[0]!r}, Python's insides. Do not use it."
            )
    for getter in tree.find_all(nodes.Getattr):
        if getter.attr.startswith("__"):
            raise Refused(
                f"chat template:{getter.lineno}: reaches for {getter.attr[:80]!r}, Python's insides. Do not use it."
            )
    known = set(environment.globals)
    return {
        "variables": sorted(meta.find_undeclared_variables(tree) - known),
        "marks_generation": any(
            isinstance(block.call, nodes.Call)
            and isinstance(block.call.node, nodes.ExtensionAttribute)
            and block.call.node.name == "_mark"
            for block in tree.find_all(nodes.CallBlock)
        ),
    }


def start(args: dict[str, Any]) -> Callable[[Any], Any]:
    """Compile `args["template"]`; the handler renders one set of variables, or answers None with its facts."""
    environment = _environment(datetime.date.fromisoformat(args["today"]))
    try:
        facts = _inspect(environment, args["template"])
        template = environment.from_string(args["template"])
    except TemplateSyntaxError as error:
        raise ModelError(
            f"chat template:{error.lineno}: {ascii(error.message)[1:-1]}. Mend it, or pass another template."
        ) from None
    most = int(args["most"])

    def handle(variables: Any) -> Any:
        if variables is None:
            return facts
        pieces, length = [], 0
        try:
            for piece in template.generate(**variables):
                pieces.append(piece)
                length += len(piece)
                if length > most:
                    raise Refused(f"chat template: writes more than {most} characters for one conversation; stopped.")
        except _Raised as error:
            raise DataError(f"the chat template says {ascii(str(error))[:300]}") from None
        except SecurityError as error:
            raise Refused(
                f"chat template: {ascii(str(error))[1:-1][:300]}; that is not what templates are for. Do not use it."
            ) from None
        except OverflowError as error:
            raise Refused(f"chat template: {ascii(str(error))[1:-1][:300]}; stopped. Do not use it.") from None
        except (
            UndefinedError,
            TemplateRuntimeError,
            TypeError,
            ValueError,
            KeyError,
            AttributeError,
            ZeroDivisionError,
        ) as error:
            raise DataError(
                f"the chat template fails with {type(error).__name__}: {ascii(str(error))[1:-1][:300]}"
            ) from None
        return _spans("".join(pieces))

    return handle


def _spans(text: str) -> dict[str, Any]:
    """Take the signs out of `text`; say which characters stood between them."""
    clean, spans, begun, at = [], [], [], 0
    for piece in re.split(f"({re.escape(_OPEN)}|{re.escape(_CLOSE)})", text):
        if piece == _OPEN:
            begun.append(at)
        elif piece == _CLOSE:
            if begun:
                spans.append([begun.pop(), at])
        else:
            clean.append(piece)
            at += len(piece)
    return {"text": "".join(clean), "spans": sorted(spans)}
