"""The book: from ``book.toml`` and the chapters to a web book that needs no network.

`read_book` reads and checks ``book.toml``, `build` makes the pages, `check_links` looks at every
link of the built pages. Sphinx and what belongs to it come with the extra ``book`` and are imported
only when pages are built. From `places` to `commands`, each module imports only from those before
it.
"""

from teleport.book.build import build, over_budget
from teleport.book.links import check_links
from teleport.book.manifest import Book, Chapter, read_book

__all__ = ["Book", "Chapter", "build", "check_links", "over_budget", "read_book"]
