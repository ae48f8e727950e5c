"""Runs chapters without drawing and writes down what they print.

``python -m tests.support.machines FILE CHAPTER...``; what libraries are to make of the processor
stands in the environment. The chapters share one start: each runs in a fork of this process.
"""

import json
import multiprocessing
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def printed(outputs: Iterable[dict[str, Any]]) -> str:
    """What can be compared of a cell's outputs: all but figures."""
    parts = []
    for output in outputs:
        if output["output_type"] == "stream":
            parts.append("".join(output["text"]))
        elif not "".join(output["data"]["text/plain"]).startswith("<Figure"):
            parts += ["".join(output["data"][kind]) for kind in sorted(output["data"])]
    return "".join(parts).strip()


def run(chapter: Path, telling: Any) -> None:
    """Send what the code cells of a chapter print, by their ids; or the error that ended it."""
    import matplotlib.pyplot as plt
    from IPython.core.displayhook import CapturingDisplayHook
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output

    os.chdir(chapter.parent)
    plt.show = lambda: None
    shell, texts = InteractiveShell.instance(), {}
    for cell in json.loads(chapter.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code":
            continue
        source = "".join(line for line in cell["source"] if not line.startswith("%"))
        values: list[dict[str, Any]] = []
        shell.display_trap.hook = CapturingDisplayHook(shell=shell, outputs=values)
        with capture_output() as captured:
            result = shell.run_cell(source)
        if not result.success:
            telling.send(f"cell {cell['id']}: {result.error_in_exec or result.error_before_exec!r}")
            return
        plt.close("all")
        stream = {"output_type": "stream", "text": captured.stdout}
        shown = [{"output_type": "display_data", "data": value["data"]} for value in values]
        texts[cell["id"]] = printed([stream, *shown])
    telling.send(texts)


def main(file: Path, chapters: list[Path]) -> None:
    """Run the chapters one after the other; a figure that is not drawn costs nothing."""
    os.environ["MPLBACKEND"] = "agg"
    import teleport.lab.analysis.curves  # noqa: F401  once for all chapters: with PyTorch and Matplotlib

    fork, found = multiprocessing.get_context("fork"), {}
    for chapter in chapters:
        told, telling = fork.Pipe(duplex=False)
        process = fork.Process(target=run, args=(chapter.resolve(), telling))
        process.start()
        telling.close()
        try:
            found[chapter.stem] = told.recv()
        except EOFError:
            found[chapter.stem] = "its process ended"
        process.join()
    file.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
