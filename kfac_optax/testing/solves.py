"""What `solve`, `multiply`, `root_solve` and `logdet` of a block owe each other."""

import jax
import jax.numpy as jnp
import numpy as np

from kfac_optax.testing.case import Case, Rows, matrix, measure
from kfac_optax.testing.comparison import close, holds, in_float64, normal


@in_float64
def check_operator(
    case: Case,
    *,
    seed: int = 0,
    examples: int = 4,
    damping: float = 0.1,
) -> None:
    """`solve` is linear in `V`, and its matrix symmetric and positive definite."""
    lam = jnp.asarray(damping)
    # F measured on random rows, then everything at one damping
    rows = case.rows(seed, examples)
    statistic = measure(case, rows, examples)
    inverse = case.block.factorize(statistic, lam)
    # [pq, pq], column by column
    dense = matrix(case.block.solve, case.shape, inverse, lam)
    scale = np.abs(dense).max()
    bound = 1e-10 * scale
    close(case, "solve is symmetric", dense, dense.T, 0, bound)
    least = _least_eigenvalue(dense)
    law = "solve is positive definite"
    holds(case, law, least > 0, f"least eigenvalue {least:.3g}")
    # the matrix was made of unit vectors: any other V has to agree with it
    v = normal(seed, case.shape)
    got = case.block.solve(inverse, v, lam)
    expected = dense @ np.ravel(v)
    close(case, "solve is linear", np.ravel(got), expected, 0, bound)


@in_float64
def check_product(
    case: Case,
    *,
    seed: int = 0,
    examples: int = 4,
    damping: float = 0.1,
) -> None:
    """The matrix of `multiply` is symmetric and positive semi-definite; with exact damping `solve`
    is the inverse of it plus the damping.
    """
    # a statistic of another sort has no product
    if not case.averaged:
        return
    rows = case.rows(seed, examples)
    statistic = measure(case, rows, examples)
    dense = matrix(case.block.multiply, case.shape, statistic)
    # sums over rows carry rounding of their largest entry
    bound = 1e-8 * np.abs(dense).max()
    close(case, "multiply is symmetric", dense, dense.T, 0, bound)
    least = _least_eigenvalue(dense)
    law = "multiply is positive semi-definite"
    holds(case, law, least >= -bound, f"least eigenvalue {least:.3g}")
    # solve = (multiply + damping I)^{-1}
    if case.exact:
        lam = jnp.asarray(damping)
        inverse = case.block.factorize(statistic, lam)
        solved = matrix(case.block.solve, case.shape, inverse, lam)
        damped = dense + damping * np.eye(len(dense))
        expected = np.linalg.inv(damped)
        atol = 1e-10 * np.abs(expected).max()
        law = "solve inverts multiply + damping I"
        close(case, law, solved, expected, 1e-9, atol)


@in_float64
def check_large_damping(case: Case, *, seed: int = 0) -> None:
    """`damping solve(V) -> V`: exact damping is within the curvature over the damping of it,
    factored damping within the root of that.
    """
    # there are blocks that no damping enters
    if not case.damped:
        return
    # so large that the curvature does not count
    lam = jnp.asarray(1e12)
    rows = case.rows(seed, 3)
    statistic = measure(case, rows, 3)
    inverse = case.block.factorize(statistic, lam)
    v = normal(seed + 1, case.shape)
    got = lam * case.block.solve(inverse, v, lam)
    bound = 1e-10 if case.exact else 1e-4
    law = "large damping leaves V / damping"
    close(case, law, got, v, bound, bound)


@in_float64
def check_loss_scale(
    case: Case,
    *,
    seed: int = 0,
    scale: float = 3.0,
) -> None:
    """A loss `s` times as large has the curvature `s^2 F`, and with the damping `s^2 lambda` solves
    are `s^-2` of what they were. A block of inputs alone solves as before.
    """
    # a damping that is shared out whatever the sizes of factors does not follow
    if not case.scales:
        return
    # forward only: inputs do not see the loss
    square = scale**2 if case.outputs else 1.0
    v = normal(seed, case.shape)
    rows = case.rows(seed, 4)
    # g of a loss s times as large
    scaled = [(a, scale * g) for a, g in rows]

    def solved(rows: Rows, damping: jax.Array) -> jax.Array:
        statistic = measure(case, rows, 4)
        inverse = case.block.factorize(statistic, damping)
        return case.block.solve(inverse, v, damping)

    lam = jnp.asarray(0.1)
    got = solved(scaled, square * lam)
    expected = solved(rows, lam) / square
    law = "solve follows the scale of the loss"
    close(case, law, got, expected, 1e-8, 1e-10)


@in_float64
def check_root(case: Case, *, seed: int = 0, damping: float = 0.1) -> None:
    """`root_solve` is linear, with a matrix `R R^T` that is that of `solve`; `logdet` is the log
    determinant of what `solve` inverts. Both are optional.
    """
    # R R^T = (F + damping I)^{-1}
    block = case.block
    lam = jnp.asarray(damping)
    rows = case.rows(seed, 4)
    inverse = block.factorize(measure(case, rows, 4), lam)
    solve = matrix(block.solve, case.shape, inverse, lam)
    if block.root_solve is not None:
        root = matrix(block.root_solve, case.shape, inverse, lam)
        atol = 1e-10 * np.abs(solve).max()
        law = "root_solve is a root of solve"
        close(case, law, root @ root.T, solve, 0, atol)
    if block.logdet is not None:
        got = block.logdet(inverse, lam, case.shape)
        # log det(F + damping I) = -log det of its inverse
        _, logdet = np.linalg.slogdet(solve)
        law = "logdet is that of the inverse of solve"
        close(case, law, got, -logdet, 1e-8, 1e-8)


def _least_eigenvalue(dense: np.ndarray) -> float:
    # of the symmetric part: a matrix that is not symmetric has been told so
    symmetric = (dense + dense.T) / 2
    return np.linalg.eigvalsh(symmetric).min()
