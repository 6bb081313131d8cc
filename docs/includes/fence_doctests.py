"""Griffe extension: examples of docstrings, `>>> ...` up to the next blank line, become blocks of code."""

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"^( *)>>> .*(?:\n(?!\s*$).*)*", re.MULTILINE)


def fence(text: str) -> str:
    r"""Puts fences around the examples of a docstring.

    >>> print(fence("Text.\n\n>>> 1 + 1\n2\n").splitlines())
    ['Text.', '', '```pycon', '>>> 1 + 1', '2', '```']
    """
    return _EXAMPLE.sub(lambda found: f"{found[1]}```pycon\n{found[0]}\n{found[1]}```", text)


class FenceDoctests(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = fence(obj.docstring.value)

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Where a module and what the package exports share a name (`fisher`), the package's name means the export."""
        if pkg.path != "kfac_optax":
            return
        exports = {str(name) for name in pkg.exports or ()}
        targets = {name: pkg[name].final_target for name in exports if pkg.members[name].is_alias}
        modules = [name for name in exports if pkg.members[name].is_module]
        hidden = {name: pkg[name][name] for name in modules if name in pkg[name].members}
        for name, target in (targets | hidden).items():
            pkg.members[name] = griffe.Alias(name, target, parent=pkg)
