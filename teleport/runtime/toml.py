"""TOML by the standard library's reader, which Python 3.10 does not have yet."""

import sys
from importlib import resources
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["packaged_table", "tomllib"]


def packaged_table(package: str, name: str) -> dict[str, Any]:
    """What a TOML file says that lies in a folder of ours."""
    return tomllib.loads((resources.files(package) / name).read_text(encoding="utf-8"))
