"""Where the pieces of a file of answers are run: a module like the one that Python runs a file in.

The module is ``__main__``, as for ``python FILE`` and in Jupyter: dataclasses, pickles and type
hints look their module up by that name. `inspect` and ``torch.jit.script`` find its source.
"""

import __future__

import ast
import asyncio
import io
import linecache
import sys
import traceback
from types import CodeType, ModuleType

from teleport.check.literal import cut
from teleport.check.magics import Shell
from teleport.check.units import Submission

_FUTURE = {getattr(__future__, name).compiler_flag for name in __future__.all_feature_names}


class Session:
    """Runs pieces that share their variables, as cells and statements do."""

    def __init__(self, submission: Submission) -> None:
        self._file = submission.file
        self._flags = 0
        module = ModuleType("__main__")
        module.__file__ = self._file
        self._names = module.__dict__
        self._names["display"] = print
        self._loop: asyncio.AbstractEventLoop | None = None
        if submission.text is not None:
            # Lines as the parser cuts them, kept under the file's name; without a time of change,
            # nobody looks for the file.
            lines = list(io.StringIO(submission.text))
            linecache.cache[self._file] = (len(submission.text), None, lines, self._file)
            self._names["get_ipython"] = Shell
            self._loop = asyncio.new_event_loop()
            self._flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        sys.modules["__main__"] = module
        sys.argv = [self._file]

    def run(self, tree: ast.Module) -> str:
        """Run a piece; the reason why it failed, or nothing.

        Raises:
            KeyboardInterrupt: if that is what it raises.
        """
        try:
            code = compile(tree, self._file, "exec", self._flags, dont_inherit=True)
            self._flags |= sum(flag for flag in _FUTURE if code.co_flags & flag)
            if self._loop is None:
                exec(code, self._names)
            else:
                return self._loop.run_until_complete(self._run_cell(code))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # exit() is a SystemExit
            return _reason(error)
        return ""

    async def _run_cell(self, code: CodeType) -> str:
        """Run a cell, in which ``await`` is allowed, while an event loop runs, as in Jupyter."""
        try:
            result = eval(code, self._names)
            if result is not None:
                await result
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            return _reason(error)
        return ""


def _reason(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return "exit() was called"
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg}"  # its line is not that of a cell
    text = "".join(traceback.format_exception_only(error)).strip()
    if isinstance(error, FileNotFoundError):
        text += " (answers are run in an empty folder and should not read files)"
    return cut(text, 2000)
