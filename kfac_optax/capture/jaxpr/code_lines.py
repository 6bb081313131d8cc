"""Where in the user's code an equation of a traced program stands."""

import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import jax

_JAX = os.path.dirname(os.path.abspath(jax.__file__))
# the package: this file is in capture/jaxpr/
_HERE = str(pathlib.Path(__file__).absolute().parents[2])
_ROOMS = ("capture", "estimators", "likelihoods")
# of what calls what the user has written, and is called by it
_INSIDE = (_JAX, *(os.path.join(_HERE, room) for room in _ROOMS))
_INSTALLED = f"{os.sep}site-packages{os.sep}"


def line_of(eqn: Any) -> str:
    """`file:line` of the innermost call of an equation outside JAX and this package; outside all
    installed packages, if there is one. `""` where the program does not say.
    """
    traceback = getattr(eqn.source_info, "traceback", None)
    frames = () if traceback is None else traceback.frames
    outside = [x for x in frames if not x.file_name.startswith(_INSIDE)]
    own = [x for x in outside if _INSTALLED not in x.file_name]
    # the user's own line, or that of an installed library
    for frame in (*own, *outside):
        return f"{_shortened(frame.file_name)}:{frame.line_num}"
    return ""


def line_of_call(eqn: Any, body: Any, line: str) -> str:
    """The line that all of a call's body stands in: that of the call, or of one around it (`line`),
    where the body is a function of JAX, whose trace is used again by other callers; else `""`.
    """
    return (line or line_of(eqn)) if _is_of_jax(body) else ""


def written_out(equations: Sequence[Any], eqn: Any, body: Any) -> list[Any]:
    """Equations of a call's body that stand in the place of the call, `eqn`: those of a function of
    JAX are in its line, too.
    """
    if not _is_of_jax(body):
        return list(equations)
    return [inner.replace(source_info=eqn.source_info) for inner in equations]


def _is_of_jax(body: Any) -> bool:
    file_name = getattr(body.debug_info, "func_filename", None) or ""
    return file_name.startswith(_INSIDE)


def _shortened(path: str) -> str:
    """Relative to where the program runs, if it is below."""
    here = os.getcwd() + os.sep
    return path.removeprefix(here)


def listed(lines: Iterable[str], most: int = 3) -> str:
    """The first of these lines, each once."""
    known = [line for line in dict.fromkeys(lines) if line]
    first = ", ".join(known[:most])
    return f"{first}, …" if len(known) > most else first
