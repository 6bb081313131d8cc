"""What a block owes its caller, whatever it models: all laws of the room."""

from kfac_optax.testing.case import Case, compiled
from kfac_optax.testing.shapes import check_mapped, check_start_and_zeros, check_types
from kfac_optax.testing.solves import (
    check_large_damping,
    check_loss_scale,
    check_operator,
    check_product,
    check_root,
)
from kfac_optax.testing.statistics import check_batch_split, check_masked, check_permutation

BLOCK_LAWS = (
    check_types,
    check_start_and_zeros,
    check_operator,
    check_product,
    check_root,
    check_large_damping,
    check_loss_scale,
    check_batch_split,
    check_permutation,
    check_masked,
    check_mapped,
)


def check_block(case: Case) -> None:
    """All laws of a block.

    Raises:
      AssertionError: a law does not hold.
    """
    # one compilation for all laws
    case = compiled(case)
    for law in BLOCK_LAWS:
        law(case)
