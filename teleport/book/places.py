"""Where the keys of a TOML document are, so that an error can name the line."""

import re
from typing import Any

from teleport.runtime.toml import tomllib

Keys = tuple[str | int, ...]
"""The way to a key: ``("title",)``, or ``("chapter", 2, "file")`` in the third ``[[chapter]]``."""


def toml_statements(text: str) -> list[tuple[int, str]]:
    """Split a TOML document into its statements, each with the number of its first line.

    A statement is a header or a key with its value, over as many lines as the value takes: the
    shortest run of lines that is TOML by itself.
    """
    found, lines, start = [], text.splitlines(), 0
    while start < len(lines):
        stop = start + 1
        while stop < len(lines) and not _is_toml("\n".join(lines[start:stop])):
            stop += 1
        statement = "\n".join(lines[start:stop])
        if statement.strip() and not statement.lstrip().startswith("#"):
            found.append((start + 1, statement))
        start = stop
    return found


def key_lines(text: str) -> dict[Keys, int]:
    """The line of every table and every key that a TOML document sets, counted from 1."""
    found: dict[Keys, int] = {}
    table: Keys = ()
    count: dict[Keys, int] = {}
    for line, statement in toml_statements(text):
        keys = _keys(tomllib.loads(statement))
        if re.match(r"\s*\[\[", statement):
            index = count.get(keys, 0)
            count[keys] = index + 1
            table = (*keys, index)
        elif re.match(r"\s*\[", statement):
            table = keys
        else:
            keys = (*table, *keys)
            found.update({keys[:end]: line for end in range(len(table) + 1, len(keys) + 1)})
            continue
        found[table] = line
    return found


def _keys(table: dict[str, Any]) -> Keys:
    """The keys down to the first value that is not a table of one entry."""
    keys: list[str] = []
    value: Any = table
    while isinstance(value, dict) and len(value) == 1:
        key, value = next(iter(value.items()))
        keys.append(key)
    return tuple(keys)


def _is_toml(text: str) -> bool:
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return False
    return True
