"""What blocks have in common that put a rule for refreshes around another block."""

from kfac_optax._types import Block


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
    own = [word for word in words if getattr(block, word) not in (None, False)]
    if own:
        raise ValueError(
            f"{where}: block {block.name!r} has a rule of its own for what it holds "
            f"({', '.join(own)}); expected one that is factorised anew at every refresh, such as "
            "kronecker() or split_kronecker()."
        )
