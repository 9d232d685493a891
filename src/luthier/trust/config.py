"""Configurations as plain data: JSON, TOML, YAML. No tags, no aliases, no interpolation, no names of classes to make.

What comes back is made of dict, list, str, int, float, bool and None only. Every complaint names file and line.
"""

import json
import math
import os
import re
import tomllib
from collections.abc import Collection, Iterable
from typing import Any

from luthier.core import ConfigError, Refused, UnknownName, near
from luthier.trust._bytes import read_capped, show
from luthier.trust._limits import Limits

__all__ = ["NAMES_CODE", "parse_json", "read_json", "read_toml", "read_yaml"]

# Keys by which other systems are told to import or make something. There is no honest use of them in what we read.
NAMES_CODE = frozenset(
    {"_target_", "_partial_", "_recursive_", "class_path", "_instantiator", "py/object", "py/reduce", "__reduce__"}
)

# Texts and comments of TOML, in the order in which they begin: what is left is keys, brackets and numbers.
_WORDS = re.compile(
    r'"""(?:[^\\]|\\.)*?(?:"""|\Z)|\'\'\'.*?(?:\'\'\'|\Z)|"(?:[^"\\\n]|\\.)*+"?|\'[^\'\n]*\'?|#[^\n]*', re.DOTALL
)
_TOKEN = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[{]|[\]}]', re.DOTALL)


def read_json(
    path: str | os.PathLike[str],
    allowed_keys: Collection[str] | None = None,
    *,
    allow_nonfinite: bool = False,
    limits: Limits = Limits(),  # noqa: B008  # frozen
) -> Any:
    """Read a JSON file as data.

    Args:
        path: a regular file in UTF-8 (a byte order mark is allowed).
        allowed_keys: the keys the outermost object may have; None allows every key.
        allow_nonfinite: let `NaN` and `Infinity` stand; the configurations of some models hold them.
        limits: caps on size, depth and number of keys.

    Raises:
        BadInput: no such file.
        ConfigError: not JSON, a key twice, a number that no float can hold.
        UnknownName: a key that is not allowed.
        Refused: over a cap, not a regular file, or a key that names code.
    """
    text = _text(path, limits.json_bytes, "JSON")
    value = parse_json(text, show(str(path), 200), allow_nonfinite=allow_nonfinite, limits=limits)
    return _settings(value, text, path, allowed_keys, limits)


def parse_json(text: str, where: str, *, allow_nonfinite: bool = False, limits: Limits = Limits()) -> Any:  # noqa: B008
    """Read JSON text as data; `where` names it in messages. Raises as `read_json`, without the key checks."""
    if (at := too_deep(text, limits.depth)) is not None:
        raise Refused(f"{where}:{_line(text, at)}: nested deeper than {limits.depth} levels; no honest file is.")

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found) > limits.keys and len(found) > limits.json_bytes // 64:
            raise Refused(f"{where}: an object of {len(found)} keys; flatten it or raise Limits.keys.")
        made = dict(found)
        if len(made) != len(found):
            names = [name for name, _ in found]
            twice = next(name for name in names if names.count(name) > 1)
            raise ConfigError(f"{where}: the key {show(twice)} stands twice in one object; remove one of them.")
        return made

    def whole(digits: str) -> int:
        if len(digits) > limits.digits:
            raise ConfigError(f"{where}: a whole number of {len(digits)} digits; at most {limits.digits} can be meant.")
        return int(digits)

    def real(digits: str) -> float:
        number = float(digits)
        if not math.isfinite(number):
            raise ConfigError(f"{where}: {show(digits)} is beyond what a float can hold; write a smaller number.")
        return number

    def constant(word: str) -> float:
        if allow_nonfinite:
            return float(word)
        raise ConfigError(f"{where}: {word} is no number in JSON; write a finite one.")

    try:
        return json.loads(text, object_pairs_hook=pairs, parse_int=whole, parse_float=real, parse_constant=constant)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{where}:{error.lineno}: not JSON: {error.msg} at column {error.colno}. Mend that line."
        ) from None


def too_deep(text: str, most: int) -> int | None:
    """The place where brackets outside of quoted text stand deeper than `most`, or None. Without recursion."""
    depth = 0
    for token in _TOKEN.finditer(text):
        sign = token[0]
        if sign in "[{":
            depth += 1
            if depth > most:
                return token.start()
        elif sign in "]}":
            depth -= 1
    return None


def read_toml(
    path: str | os.PathLike[str],
    allowed_keys: Collection[str] | None = None,
    *,
    limits: Limits = Limits(),  # noqa: B008
) -> dict[str, Any]:
    """Read a TOML file as data. Dates are refused: nothing of ours takes one.

    Raises:
        BadInput: no such file.
        ConfigError: not TOML, or a number that no float can hold.
        UnknownName: a key that is not allowed.
        Refused: over a cap, not a regular file, a key that names code, or `${...}`, which we do not fill in.
    """
    text = _text(path, limits.toml_bytes, "TOML")
    where = show(str(path), 200)
    if text.count("=") > limits.keys:
        raise Refused(f"{where}: more than {limits.keys} assignments; a settings file has fewer.")
    bare = _WORDS.sub(lambda found: "\n" * found[0].count("\n"), text)
    if (at := too_deep(bare, limits.depth)) is not None:
        raise Refused(f"{where}:{_line(bare, at)}: nested deeper than {limits.depth} levels; no honest file is.")
    for number, line in enumerate(bare.split("\n"), 1):
        # Dotted keys cost tomllib the square of their length; an honest one has a handful of dots.
        if any(part.count(".") > limits.depth for part in re.split(r"[,=\[\]{}]", line)):
            raise Refused(f"{where}:{number}: a key of more than {limits.depth} parts; no honest file has one.")
        if digits := re.search(rf"[0-9a-fA-F_]{{{limits.digits + 1},}}", line.partition("=")[2]):
            length = len(digits[0])
            raise ConfigError(f"{where}:{number}: a number of {length} digits; at most {limits.digits} can be meant.")
    try:
        value = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"at line (\d+)", str(error))
        raise ConfigError(
            f"{where}:{found[1] if found else '1'}: not TOML: {show(str(error), 200)}. Mend that line."
        ) from None
    except RecursionError:
        raise Refused(f"{where}: nested deeper than the reader can follow; no honest file is.") from None
    return dict(_settings(value, text, path, allowed_keys, limits))


def read_yaml(
    path: str | os.PathLike[str],
    allowed_keys: Collection[str] | None = None,
    *,
    limits: Limits = Limits(),  # noqa: B008
) -> Any:
    """Read a YAML file as data: no tags, no anchors or aliases, one document, every key once.

    Raises:
        BadInput: no such file.
        ConfigError: not YAML, a key twice, a date, a number that no float can hold.
        UnknownName: a key that is not allowed.
        Refused: over a cap, not a regular file, a tag, an alias, a key that names code, or `${...}`.
    """
    try:
        import yaml
    except ImportError:
        raise ConfigError(
            f"{show(str(path), 200)}: reading YAML needs PyYAML. `pip install pyyaml`, or write TOML."
        ) from None

    text = _text(path, limits.yaml_bytes, "YAML")
    where = show(str(path), 200)
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            line = event.start_mark.line + 1 if event.start_mark else 1
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
                raise Refused(f"{where}:{line}: anchors and aliases (& and *) are not followed; write the value out.")
            if (tag := getattr(event, "tag", None)) is not None:
                raise Refused(f"{where}:{line}: the tag {show(tag)} asks for a type; write plain data without tags.")
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
                if depth > limits.depth:
                    raise Refused(f"{where}:{line}: nested deeper than {limits.depth} levels; no honest file is.")
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return {}
        _yaml_keys(node, where, yaml)
        value = loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        line = mark.line + 1 if mark else 1
        raise ConfigError(
            f"{where}:{line}: not YAML: {show(getattr(error, 'problem', None) or str(error), 200)}. Mend that line."
        ) from None
    except ValueError as error:  # 4,300 digits, the 31st of February
        raise ConfigError(
            f"{where}: a value that cannot be read ({show(str(error), 120)}). Quote it if it is text."
        ) from None
    return _settings(value, text, path, allowed_keys, limits)


def _yaml_keys(node: Any, where: str, yaml: Any) -> None:
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if isinstance(node, yaml.MappingNode):
            seen = set()
            for key, value in node.value:
                line = key.start_mark.line + 1
                if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                    raise ConfigError(f"{where}:{line}: a key that is not text; put quotes around it.")
                if key.value in seen:
                    raise ConfigError(f"{where}:{line}: the key {show(key.value)} stands twice; remove one of them.")
                seen.add(key.value)
                waiting.append(value)
        elif isinstance(node, yaml.SequenceNode):
            waiting.extend(node.value)


def _text(path: str | os.PathLike[str], cap: int, what: str) -> str:
    content = read_capped(path, cap, f"a {what} file")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{show(str(path), 200)}: byte {error.start} is not UTF-8. Save the file as UTF-8 and try again."
        ) from None
    if "\x00" in text:
        line = _line(text, text.index("\x00"))
        raise Refused(f"{show(str(path), 200)}:{line}: holds a NUL character; {what} is text. Save the file again.")
    return text


def _settings(
    value: Any, text: str, path: str | os.PathLike[str], allowed: Collection[str] | None, limits: Limits
) -> Any:
    """Check keys and values. With `allowed`, or in TOML and YAML, the file is settings, and `${...}` is refused."""
    where = show(str(path), 200)
    is_settings = allowed is not None or not str(path).endswith(".json")
    if allowed is not None:
        if not isinstance(value, dict):
            raise ConfigError(f"{where}:1: must be an object of settings, got {type(value).__name__}.")
        for name in value:
            if name not in allowed:
                raise UnknownName(
                    f"{where}:{_line_of_key(text, name)}: unknown key {show(name)}.{near(name, sorted(allowed))} "
                    f"Allowed here: {', '.join(sorted(allowed))}."
                )
    waiting = [(value, 0)]
    while waiting:
        item, depth = waiting.pop()
        if depth > limits.depth:
            raise Refused(f"{where}: nested deeper than {limits.depth} levels; no honest file is.")
        if isinstance(item, dict):
            for name in item:
                if name in NAMES_CODE:
                    raise Refused(
                        f"{where}:{_line_of_key(text, name)}: the key {show(name)} names code to run; we make nothing "
                        "from a name in a file. Remove it and choose by short name (`luthier methods`)."
                    )
            waiting.extend((v, depth + 1) for v in item.values())
        elif isinstance(item, list):
            waiting.extend((v, depth + 1) for v in item)
        elif isinstance(item, str):
            if is_settings and "${" in item:
                raise Refused(
                    f"{where}:{_line(text, max(text.find(item), 0))}: {show(item)} asks for a value to be filled in; "
                    "nothing is. Write the value itself."
                )
        elif isinstance(item, float):
            if is_settings and not math.isfinite(item):
                raise ConfigError(f"{where}: a number that is not finite; write a finite one.")
        elif item is not None and not isinstance(item, int):
            raise ConfigError(
                f"{where}: a value of type {type(item).__name__} ({show(str(item))}); put quotes around it."
            )
    return value


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def _line_of_key(text: str, name: str) -> int:
    spelled: Iterable[str] = (json.dumps(name), json.dumps(name, ensure_ascii=False), name)
    for spelling in spelled:
        if (at := text.find(spelling)) >= 0:
            return _line(text, at)
    return 1
