"""What blocks and transformations owe their callers, as functions to run on one of your own.

Every `check_...` raises `AssertionError` with the law that does not hold and the number that shows
it; `check_block` and `check_transformation` go through all of them. Only numpy and JAX are needed.
"""

from kfac_optax.testing.blocks import check_block
from kfac_optax.testing.case import Case, dense_case, dense_layer
from kfac_optax.testing.shapes import check_mapped, check_start_and_zeros, check_types
from kfac_optax.testing.solves import (
    check_large_damping,
    check_loss_scale,
    check_operator,
    check_product,
)
from kfac_optax.testing.statistics import check_batch_split, check_masked, check_permutation
from kfac_optax.testing.transformations import (
    Trial,
    check_broken_batch,
    check_checkpoint,
    check_factorizations,
    check_steps,
    check_transformation,
    check_zero_batch,
)

__all__ = [
    "Case",
    "Trial",
    "check_batch_split",
    "check_block",
    "check_broken_batch",
    "check_checkpoint",
    "check_factorizations",
    "check_large_damping",
    "check_loss_scale",
    "check_mapped",
    "check_masked",
    "check_operator",
    "check_permutation",
    "check_product",
    "check_start_and_zeros",
    "check_steps",
    "check_transformation",
    "check_types",
    "check_zero_batch",
    "dense_case",
    "dense_layer",
]
