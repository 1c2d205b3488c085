"""``%%gpu_remote``: a notebook's cell that runs on a shared GPU. Loaded by ``%load_ext ray_gpu``."""

from __future__ import annotations

import argparse
import ast
import linecache
import re
import shlex
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from IPython.core.error import UsageError
from IPython.core.magic import Magics, cell_magic, magics_class

from ray_gpu.api import gpu_remote

_BATCH = "batch"
_FUNCTION = "cell"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}. {self.format_usage().strip()}")


_parser = _Parser(prog="%%gpu_remote", add_help=False)
_parser.add_argument("-i", "--inputs", default="")
_parser.add_argument("-o", "--outputs", default="")
_parser.add_argument("-d", "--data", default="")
_parser.add_argument("--map", action="store_true")
_parser.add_argument("options", nargs="*")


@magics_class
class GpuMagics(Magics):
    """What ``%load_ext ray_gpu`` adds."""

    _cells = 0

    @cell_magic("gpu_remote")  # type: ignore[arg-type]  # IPython's says that it decorates nothing
    def run(self, line: str, cell: str) -> None:
        """Run the cell on a GPU node.

        Named inputs go out sealed, named outputs come back, and nothing else does: what the cell uses of the notebook
        besides travels as what a function captures does, functions and modules but no data. ::

            %%gpu_remote -i weights,bias -o loss num_gpus=0.5
            %%gpu_remote --data people -o total          (the cell gets all rows as `batch`)
            %%gpu_remote --data people --map -o scores   (each shard: one row back for each row)
        """
        given = _parser.parse_args(shlex.split(line))
        inputs, outputs = _names(given.inputs), _names(given.outputs)
        if given.map and (not given.data or len(outputs) != 1):
            raise UsageError("--map needs --data and one output, as in: %%gpu_remote --data people --map -o scores")
        assert self.shell is not None
        GpuMagics._cells += 1
        names = [*([_BATCH] if given.data else []), *inputs]
        place = f"<gpu_remote cell {self._cells}>"
        remote = gpu_remote(
            _function(cell, names, outputs, self.shell.user_ns, place, one=given.map), **_options(given.options)
        )
        values = [self._variable(name) for name in inputs]
        if given.map:
            self.shell.user_ns[outputs[0]] = remote.map(self._variable(given.data), *values)
            return
        data = [self._variable(given.data)] if given.data else []
        found = remote.remote(*data, *values).result()
        self.shell.user_ns.update(zip(outputs, found, strict=True))

    def _variable(self, name: str) -> Any:
        assert self.shell is not None
        if name not in self.shell.user_ns:
            raise UsageError(f"there is no variable {name!r} in this notebook; run the cell that makes it first")
        return self.shell.user_ns[name]


def _names(text: str) -> list[str]:
    names = [name for name in re.split(r"[,\s]+", text) if name]
    for name in names:
        if not name.isidentifier():
            raise UsageError(f"{name!r} is no variable's name; write names with commas, as in -i weights,bias")
    return names


def _options(words: Sequence[str]) -> dict[str, Any]:
    text = ", ".join(words)
    try:
        call: Any = ast.parse(f"f({text})", mode="eval").body
        if call.args:
            raise ValueError
        return {word.arg: ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, ValueError):
        raise UsageError(f"options are written name=value, without blanks, as in num_gpus=0.5; not {text!r}") from None


def _function(
    cell: str, inputs: Sequence[str], outputs: Sequence[str], variables: dict[str, Any], name: str, *, one: bool
) -> Callable[..., Any]:
    """Return the cell as a function of its inputs that returns its outputs; its globals are the notebook's."""
    try:
        body = ast.parse(cell, name).body
    except SyntaxError as error:
        raise UsageError(f"the cell is no Python: {error}") from None
    returned: ast.expr = ast.Tuple([ast.Name(output, ast.Load()) for output in outputs], ast.Load())
    if one:
        returned = ast.Name(outputs[0], ast.Load())
    made: Any = ast.parse(f"def {_FUNCTION}({', '.join(inputs)}): pass")
    made.body[0].body = [*body, ast.Return(returned)]
    # So that tracebacks show the cell's lines.
    linecache.cache[name] = (len(cell), None, cell.splitlines(keepends=True), name)
    own: dict[str, Any] = {}
    exec(compile(ast.fix_missing_locations(made), name, "exec"), variables, own)
    function: Callable[..., Any] = own[_FUNCTION]
    return function
