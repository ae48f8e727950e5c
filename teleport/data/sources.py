"""The files of every data set, from ``sources.toml`` beside this module."""

from teleport.data.download import SourceFile
from teleport.runtime.toml import packaged_table

FILES = {
    key: tuple(
        SourceFile(name, tuple(f"{folder}{name}" for folder in entry["urls"]), *digests)
        for name, digests in entry["files"].items()
    )
    for key, entry in packaged_table("teleport.data", "sources.toml").items()
}
"""By name of what is downloaded together."""
