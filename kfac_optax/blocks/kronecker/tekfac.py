"""EKFAC's correction in the eigenbasis of the trace-restricted block."""

import jax

from kfac_optax._types import Block
from kfac_optax.blocks.kronecker.ekfac import eigenvalue_corrected
from kfac_optax.blocks.kronecker.tkfac import tkfac_block


def tekfac_block(*, sharing: str = "expand", precision: jax.lax.PrecisionLike = "highest") -> Block:
    """`ekfac_block` in the eigenbasis of `tkfac_block` in place of that of `kronecker`.

    `F ~ U diag(S) U^T` with `U = U_Phi (x) U_Psi` and
    `S = (1/N) sum_b (U_Phi^T D_b U_Psi)^2`, entry by entry, of the gradients `D_b` of single
    examples. Until the next statistic `S` is `delta s_Phi s_Psi^T`. The damping is exact.

    Args:
      sharing: `"expand"` or `"exact"`, of the factors, see `tkfac_block`.
      precision: matmul precision of moments and solves.

    Returns:
      A `Block`.

    Raises:
      ValueError: unknown `sharing`.

    >>> print(tekfac_block().name)
    tekfac

    Reference: Gao et al., Eigenvalue-corrected Natural Gradient Based on a New Approximation (2020).
    """
    # the basis is that of Phi and Psi, the correction that of `ekfac_block`
    plain = tkfac_block(sharing=sharing, precision=precision)
    name = "tekfac" if sharing == "expand" else f"tekfac ({sharing})"
    return eigenvalue_corrected(plain, name, precision)
