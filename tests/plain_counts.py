"""Texts in the code that put a number before a plural, and so say "1 clips"; found in the syntax, not by running.

A text is an f-string, or a string with %d; its number is any that the code computes. `selva.utils.text.counted` says it
right.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

# Things that people count; a plural that is missing here is not looked for.
NOUNS = (
    "adapters|bins|blocks|bytes|captions|cells|channels|checkpoints|chunks|clips|columns|cores|directions|entries|epochs|"
    "errors|files|folders|frames|groups|hours|images|items|jobs|keys|kills|layers|lengths|levels|lines|machines|messages|"
    "minutes|names|notes|objects|pairs|parameters|parts|packets|passes|pictures|pieces|pixels|points|processes|prompts|"
    "rates|readers|recordings|regions|rows|runs|samples|scenes|segments|seeds|sets|settings|shapes|shards|snapshots|"
    "sounds|stages|steps|strokes|systems|tables|tensors|tests|texts|threads|times|tokens|tracks|updates|validations|"
    "values|videos|warnings|weights|widths|windows|words|workers"
)
NUMBER = "\0"  # in a text, in place of a number that is computed
_NO_ADJECTIVE = r"(?!(?:of|to|in|at|on|for|and|or|is|are|as|has|holds|says|takes|reads|lists|features) )"
_PLURAL = re.compile(rf"{NUMBER} (?:{_NO_ADJECTIVE}[a-z-]+ ){{0,2}}(?:{NOUNS})\b")
_PERCENT = re.compile(r"%(?:\(\w+\))?[d,]")
_OF_TEXT = ("name", "what", "kind")  # names of variables that never hold a number


def plural_counts(syntax: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of every text that says a plural after any number."""
    quiet: set[ast.AST] = set()  # docstrings, and parts of f-strings
    for node in ast.walk(syntax):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            quiet.add(node.body[0].value)  # pyright: ignore[reportAttributeAccessIssue]  -- it has a docstring
        elif isinstance(node, ast.JoinedStr):
            quiet.update(part for part in ast.walk(node) if part is not node)
    for node in ast.walk(syntax):
        if isinstance(node, ast.expr) and node not in quiet and _PLURAL.search(text := _text(node)):
            yield node.lineno, text.replace(NUMBER, "N")


def _text(node: ast.expr) -> str:
    """Return a text with NUMBER in place of each number that may be any, "" for all other nodes."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return _PERCENT.sub(NUMBER, node.value)
    if not isinstance(node, ast.JoinedStr):
        return ""
    parts = (part.value if isinstance(part, ast.Constant) else NUMBER if _may_be_one(part) else "..."
             for part in node.values)
    return "".join(map(str, parts))


def _may_be_one(part: ast.expr) -> bool:
    """Return True for a whole number that is computed: no constant, no decimals or width, no text."""
    if not isinstance(part, ast.FormattedValue) or part.conversion != -1:
        return False
    if part.format_spec is not None and ast.unparse(part.format_spec)[2:-1] not in ("", ",", "d"):
        return False
    value = part.value
    if isinstance(value, ast.Call):
        return isinstance(value.func, ast.Name) and value.func.id in ("len", "sum", "max", "min", "int", "round")
    name = value.attr if isinstance(value, ast.Attribute) else value.id if isinstance(value, ast.Name) else ""
    return not name.isupper() and name not in _OF_TEXT and not isinstance(value, ast.IfExp | ast.JoinedStr)
