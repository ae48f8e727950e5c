"""The files of every data set, from ``sources.toml`` beside this module."""

from importlib import resources

from teleport.data.download import SourceFile
from teleport.runtime.toml import tomllib


def _read() -> dict[str, tuple[SourceFile, ...]]:
    text = (resources.files("teleport.data") / "sources.toml").read_text(encoding="utf-8")
    return {
        key: tuple(
            SourceFile(name, tuple(f"{folder}{name}" for folder in entry["urls"]), *digests)
            for name, digests in entry["files"].items()
        )
        for key, entry in tomllib.loads(text).items()
    }


FILES = _read()
"""By name of what is downloaded together."""
