"""What blocks have in common that put a rule for refreshes around another block."""

from collections.abc import Callable
from typing import Any

import jax

from kfac_optax._types import Block, PyTree


def check_without_rules(where: str, block: Block) -> None:
    """Refuses a block that does not leave it to the schedule when it is factorised.

    Raises:
      ValueError: it has `refresh`, `absorb`, `due` or `reads_inverse`.

    >>> import kfac_optax as ko
    >>> check_without_rules("here", ko.low_rank(2))
    Traceback (most recent call last):
    ValueError: here: block 'low rank (2)' has a rule of its own for what it holds (refresh); expected one that ...
    """
    words = ("refresh", "absorb", "due", "reads_inverse")
    # what a block leaves out is `None`, or `False`
    has = {word: getattr(block, word) for word in words}
    own = [word for word, rule in has.items() if rule not in (None, False)]
    if own:
        raise ValueError(
            f"{where}: block {block.name!r} has a rule of its own for what it holds "
            f"({', '.join(own)}); expected one that is factorised anew at every refresh, such as "
            "kronecker() or split_kronecker()."
        )


def uses_of_inverse(block: Block, inner: Callable[[Any], PyTree]) -> dict[str, Any]:
    """`solve`, `root_solve` and `logdet` of a block around another, whose inverse is in its own.

    Args:
      block: the one inside.
      inner: its inverse, of that of the block around it.
    """

    # each takes the inner inverse out of what is held around it
    def solve(
        held: Any,
        v: jax.Array,
        damping: jax.Array,
    ) -> jax.Array:
        return block.solve(inner(held), v, damping)

    def root_solve(
        held: Any,
        z: jax.Array,
        damping: jax.Array,
    ) -> jax.Array:
        assert block.root_solve is not None
        return block.root_solve(inner(held), z, damping)

    def logdet(
        held: Any,
        damping: jax.Array,
        shape: tuple[int, int],
    ) -> jax.Array:
        assert block.logdet is not None
        return block.logdet(inner(held), damping, shape)

    # what the inner block cannot do, the outer one cannot either
    return {
        "solve": solve,
        "root_solve": None if block.root_solve is None else root_solve,
        "logdet": None if block.logdet is None else logdet,
    }
