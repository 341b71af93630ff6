"""YAML that people write, read so that nothing in it is lost or changed in silence. Needs no PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from selva.utils.errors import UserError

# Values that are no YAML for all their looks, such as the date 2024-13-45, stop PyYAML's constructors in these ways.
_VALUE_ERRORS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError)


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file; see :func:`parse_yaml`.

    Raises:
        ValueError: it cannot be read, or says what YAML would change or leave out.
    """
    return parse_yaml(yaml_text(path, str(path)), str(path))


def yaml_text(path: Path, name: str) -> str:
    """Return the text of a YAML file, which messages call ``name``.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name}: cannot be read as YAML: {' '.join(str(error).split())}") from error


def parse_yaml(text: str, name: str) -> Any:
    """Return the content of a YAML text.

    YAML itself takes the last of several equal keys, and reads ``0500`` as 320 (octal) and ``1:30`` as 90 (to the base
    60); here both are refused.

    Args:
        name: what messages call it.

    Raises:
        ValueError: it is no YAML, has a key twice, or has a number that YAML reads as another one; names the lines.
    """
    import yaml

    try:
        root = yaml.compose(text, yaml.SafeLoader)
        problems = _problems(root)
        content = yaml.safe_load(text)
    except RecursionError as error:
        raise UserError(f"{name}: cannot be read as YAML: it is nested too deeply") from error
    except (yaml.YAMLError, *_VALUE_ERRORS) as error:
        raise UserError(f"{name}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    if problems:
        raise UserError(f"{name}: {'; '.join(problems)}")
    return content


def _problems(root: Any) -> list[str]:
    """Return a sentence for every key that is there twice and every number that YAML changes, from the first line on.

    Args:
        root: node of the whole text; None of an empty one. Nodes that aliases repeat are looked at once.
    """
    import yaml

    loader, problems, seen, waiting = yaml.SafeLoader(""), [], set(), [("", root)]
    while waiting:
        key, node = waiting.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            keys: dict[tuple[str, str], Any] = {}
            for name, value in node.value:
                waiting.append((name.value if isinstance(name, yaml.ScalarNode) else "", value))
                if not isinstance(name, yaml.ScalarNode) or keys.setdefault((name.tag, name.value), name) is name:
                    continue
                first, line = (one.start_mark.line + 1 for one in (keys[name.tag, name.value], name))
                problems.append((line, f"{name.value} stands in line {first} and again in line {line}, and YAML would "
                                       "take the last one; give it once"))
        elif isinstance(node, yaml.SequenceNode):
            waiting += [(key, value) for value in node.value]
        elif node.style is None and node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float"):
            value, line = loader.construct_object(node), node.start_mark.line + 1
            if not _is_number(node.value, value):
                problems.append((line, f"{key or 'a value'} is {node.value}, which YAML reads as {value}; put it "
                                       f"between quotation marks if it is a text, or write the number plainly (line "
                                       f"{line})"))
    return [problem for _, problem in sorted(problems)]


def _is_number(text: str, value: float) -> bool:
    """Return True if a text is this number to everyone, as on a command line."""
    for kind in (int, float):
        try:
            return kind(text) == value
        except ValueError:
            continue
    return text.lstrip("+-.").lower() in ("inf", "nan")  # .inf is how YAML writes it
