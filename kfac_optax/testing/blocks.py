"""What a block owes its caller, whatever it models."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kfac_optax._types import PyTree
from kfac_optax.testing.case import Case, compiled, matrix, measure


def check_block(case: Case) -> None:
    """All laws of a block.

    Raises:
      AssertionError: a law does not hold.
    """
    # one compilation for all laws
    case = compiled(case)
    for law in BLOCK_LAWS:
        law(case)


def in_float64(check: Callable[..., None]) -> Callable[..., None]:
    """Runs a check in double precision, where bounds are tight."""

    @functools.wraps(check)
    def checked(*args: Any, **options: Any) -> None:
        with jax.enable_x64(True):
            check(*args, **options)

    return checked


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
    statistic = measure(case, case.rows(seed, examples), examples)
    inverse = case.block.factorize(statistic, lam)
    # [pq, pq], column by column
    dense = matrix(case.block.solve, case.shape, inverse, lam)
    scale = np.abs(dense).max()
    _close(case, "solve is symmetric", dense, dense.T, 0, 1e-10 * scale)
    least = np.linalg.eigvalsh((dense + dense.T) / 2).min()
    _holds(case, "solve is positive definite", least > 0, f"least eigenvalue {least:.3g}")
    # the matrix was made of unit vectors: any other V has to agree with it
    v = _normal(seed, case.shape)
    got = np.ravel(case.block.solve(inverse, v, lam))
    _close(case, "solve is linear", got, dense @ np.ravel(v), 0, 1e-10 * scale)


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
    statistic = measure(case, case.rows(seed, examples), examples)
    dense = matrix(case.block.multiply, case.shape, statistic)
    scale = np.abs(dense).max()
    _close(case, "multiply is symmetric", dense, dense.T, 0, 1e-8 * scale)
    least = np.linalg.eigvalsh((dense + dense.T) / 2).min()
    law = "multiply is positive semi-definite"
    _holds(case, law, least >= -1e-8 * scale, f"least eigenvalue {least:.3g}")
    # solve = (multiply + damping I)^{-1}
    if case.exact:
        lam = jnp.asarray(damping)
        inverse = case.block.factorize(statistic, lam)
        solved = matrix(case.block.solve, case.shape, inverse, lam)
        expected = np.linalg.inv(dense + damping * np.eye(len(dense)))
        atol = 1e-10 * np.abs(expected).max()
        _close(case, "solve inverts multiply + damping I", solved, expected, 1e-9, atol)


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
    statistic = measure(case, case.rows(seed, 3), 3)
    inverse = case.block.factorize(statistic, lam)
    v = _normal(seed + 1, case.shape)
    bound = 1e-10 if case.exact else 1e-4
    got = lam * case.block.solve(inverse, v, lam)
    _close(case, "large damping leaves V / damping", got, v, bound, bound)


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
    rows, lam = case.rows(seed, 4), jnp.asarray(0.1)
    # g of a loss s times as large
    scaled = [(a, scale * g) for a, g in rows]
    plain, large = measure(case, rows, 4), measure(case, scaled, 4)
    v = _normal(seed, case.shape)
    inverse, of_large = case.block.factorize(plain, lam), case.block.factorize(large, square * lam)
    got = case.block.solve(of_large, v, square * lam)
    expected = case.block.solve(inverse, v, lam) / square
    _close(case, "solve follows the scale of the loss", got, expected, 1e-8, 1e-10)


@in_float64
def check_batch_split(case: Case, *, seed: int = 0) -> None:
    """The statistic of a batch is the mean of those of its halves, so a running average is
    exact.
    """
    first, second = case.rows(seed, 3), case.rows(seed + 10, 3)
    pairs = zip(first, second, strict=True)
    joined = [(_joined(a, c), _joined(g, h)) for (a, g), (c, h) in pairs]
    # (F_1 + F_2) / 2 = F_12 for halves of equal size
    parts = measure(case, first, 3), measure(case, second, 3)
    mean = jax.tree.map(lambda x, y: (x + y) / 2, *parts)
    law = "measure of a batch is the mean of its halves"
    _close(case, law, measure(case, joined, 6), mean, 1e-10, 1e-12)


@in_float64
def check_permutation(case: Case, *, seed: int = 0) -> None:
    """The order of the examples has no influence."""
    # an order that leaves no example where it was
    rows, order = case.rows(seed, 4), jnp.asarray([2, 0, 3, 1])
    moved = [(a[order], g[order]) for a, g in rows]
    law = "measure does not depend on the order of examples"
    got, expected = measure(case, moved, 4), measure(case, rows, 4)
    _close(case, law, got, expected, 1e-10, 1e-12)


@in_float64
def check_masked(case: Case, *, seed: int = 0) -> None:
    """An example of weight zero counts as dropped, though it may hold NaN; weights have mean one,
    and `g` holds their root, or the weights themselves where a block takes first moments.
    """
    weights = jnp.asarray([0.0, 2.0])
    # first moments are means of g, second ones have the root of the weight inside
    inside = weights if case.block.first_moments else jnp.sqrt(weights)
    masked, alone = [], []
    for a, g in case.rows(seed, 2):
        # an integer cannot be NaN
        broken = a if jnp.issubdtype(a.dtype, jnp.integer) else a.at[0].set(jnp.nan)
        # a weight of zero makes a gradient of zero
        beside = inside.reshape(-1, *(1,) * (g.ndim - 1))
        masked.append((broken, g * beside))
        alone.append((a[1:], g[1:]))
    got, expected = measure(case, masked, 2, weights=weights), measure(case, alone, 1)
    _close(case, "an example of weight zero counts as dropped", got, expected, 1e-10, 1e-12)


@in_float64
def check_root(case: Case, *, seed: int = 0, damping: float = 0.1) -> None:
    """`root_solve` is linear, with a matrix `R R^T` that is that of `solve`; `logdet` is the log
    determinant of what `solve` inverts. Both are optional.
    """
    # R R^T = (F + damping I)^{-1}
    block, lam = case.block, jnp.asarray(damping)
    inverse = block.factorize(measure(case, case.rows(seed, 4), 4), lam)
    solve = matrix(block.solve, case.shape, inverse, lam)
    if block.root_solve is not None:
        root = matrix(block.root_solve, case.shape, inverse, lam)
        atol = 1e-10 * np.abs(solve).max()
        _close(case, "root_solve is a root of solve", root @ root.T, solve, 0, atol)
    if block.logdet is not None:
        got = block.logdet(inverse, lam, case.shape)
        # log det(F + damping I) = -log det of its inverse
        expected = -np.linalg.slogdet(solve)[1]
        _close(case, "logdet is that of the inverse of solve", got, expected, 1e-8, 1e-8)


def check_start_and_zeros(case: Case) -> None:
    """Before any statistic, and after one of zeros, everything is finite; zeros leave
    `V / damping`.
    """
    # single precision, as in training
    lam, v = jnp.float32(1e-3), jnp.ones(case.shape, jnp.float32)
    start = case.block.init(case.layer, jnp.float32)
    zeros = jax.tree.map(jnp.zeros_like, start)
    for name, statistic in ("init", start), ("zeros", zeros):
        inverse = case.block.factorize(statistic, lam)
        got = case.block.solve(inverse, v, lam)
        made = jax.tree.leaves((inverse, got))
        finite = all(np.isfinite(x).all() for x in made)
        _holds(case, f"{name}: all that is made of it is finite", finite, "found NaN or infinity")
    if case.damped:
        _close(case, "zeros leave V / damping", got, v / lam, 1e-4, 0)


def check_types(case: Case) -> None:
    """A statistic of bfloat16 rows has the shapes and dtypes of `init`; what is made of it is
    float32 (or counts), and not of weak type.
    """
    start = jax.eval_shape(lambda: case.block.init(case.layer, jnp.float32))
    # a batch in half precision
    rows = [(_low(a), _low(g)) for a, g in case.rows(0, 3)]
    # shapes alone: nothing is computed
    measured = jax.eval_shape(lambda: measure(case, rows, 3, jnp.float32))
    got, expected = _kinds(measured), _kinds(start)
    law = "measure has the shapes and dtypes of init"
    _holds(case, law, got == expected, f"got {got}, expected {expected}")
    number = jax.ShapeDtypeStruct((), jnp.float32)
    inverse = jax.eval_shape(case.block.factorize, start, number)
    v = jax.ShapeDtypeStruct(case.shape, jnp.float32)
    solved = jax.eval_shape(case.block.solve, inverse, v, number)
    # weak types would compile every step once more
    for x in jax.tree.leaves((start, inverse, solved)):
        strong = not x.weak_type and x.dtype in (jnp.float32, jnp.int32)
        _holds(case, "float32 in, float32 out", strong, f"found {x} (weak: {x.weak_type})")
    _holds(case, "solve keeps the shape", solved.shape == case.shape, f"got {solved.shape}")


@in_float64
def check_mapped(case: Case) -> None:
    """Layers that share a batched call get what they would get alone."""
    # two layers of one bucket
    lam, v = jnp.asarray(0.1), _normal(5, (2, *case.shape))
    single = [measure(case, case.rows(seed, 3), 3) for seed in (0, 1)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *single)
    inverse = jax.vmap(case.block.factorize, (0, None))(stacked, lam)
    solved = jax.vmap(case.block.solve, (0, 0, None))(inverse, v, lam)
    # each of them as if it were alone
    for i, statistic in enumerate(single):
        own = case.block.factorize(statistic, lam)
        alone = case.block.solve(own, v[i], lam)
        _close(case, "solve under vmap is solve", solved[i], alone, 1e-8, 1e-10)


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


def _normal(seed: int, shape: tuple[int, ...]) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def _joined(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.concatenate([x, y])


def _low(x: jax.Array) -> jax.Array:
    return x if jnp.issubdtype(x.dtype, jnp.integer) else x.astype(jnp.bfloat16)


def _kinds(tree: PyTree) -> list[tuple]:
    return [(x.shape, str(x.dtype)) for x in jax.tree.leaves(tree)]


def _holds(case: Case, law: str, true: Any, number: str) -> None:
    if not true:
        raise AssertionError(f"block {case.block.name!r}: {law}: {number}.")


def _close(
    case: Case,
    law: str,
    got: PyTree,
    expected: PyTree,
    rtol: float,
    atol: float,
) -> None:
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    for x, y in pairs:
        x, y = np.asarray(x), np.asarray(y)
        # NaN is close to nothing
        if not np.allclose(x, y, rtol=rtol, atol=atol):
            off = np.abs(x - y).max()
            text = f"off by {off:.3g} where the largest entry is {np.abs(y).max():.3g}"
            raise AssertionError(f"block {case.block.name!r}: {law}: {text}.")
