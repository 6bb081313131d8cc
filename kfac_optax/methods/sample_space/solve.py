"""One solve in sample space, with the momentum of SPRING."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfac_optax._tree import all_finite, inner, named_leaves, wide_dtype
from kfac_optax._types import Layers, PyTree, ScalarOrSchedule
from kfac_optax.linalg.smw import (
    factor_kernel,
    kernel_of,
    residual_of,
    solve_in_parameters,
    solve_in_samples,
)
from kfac_optax.methods.sample_space.from_rows import kernel_of_rows, rows_of_gradient
from kfac_optax.methods.sample_space.space import Leaves, Space, sample_space
from kfac_optax.step_rules._per_layer import require_curvature


class Rule(NamedTuple):
    """The settings of a transformation, see `smw`."""

    where: str
    layers: Layers | None
    damping: ScalarOrSchedule
    momentum: ScalarOrSchedule | None
    cutoff: float | None
    sampled: bool
    chunk: int
    refine: int
    axis_name: Any


class Solved(NamedTuple):
    """A solution, what it has left of the right-hand side, and whether it can be used."""

    solution: Leaves
    error: jax.Array
    usable: jax.Array  # bool


def next_direction(
    rule: Rule,
    previous: PyTree,
    leaves: Leaves,
    curvature: Any,
    residual: PyTree,
    damping: Any,
    momentum: Any,
) -> tuple[Leaves, Solved]:
    """The new direction and how it was solved for; nothing is read of a batch that is not finite."""
    # products with J / sqrt(N) and its transpose
    space = _space(rule, curvature, leaves)
    dtype = wide_dtype(leaves)
    gradient = {n: x.astype(dtype) for n, x in leaves.items()}
    # with residuals V = J^T start / sqrt(N)
    start = None if residual is None else space.flat(residual)
    if momentum is None:
        solved = _solve(rule, curvature, space, gradient, start, damping)
        return solved.solution, solved
    # SPRING: what the batch sees of the last direction, mu J phi, is taken off the right-hand side
    momentum = jnp.asarray(momentum, dtype)
    kept = {n: momentum * x for n, x in named_leaves(previous).items()}
    there = space.forward(kept)
    if start is None:
        back = space.adjoint(there)
        gradient = {n: x - back[n] for n, x in gradient.items()}
    else:
        start = start - there
    solved = _solve(rule, curvature, space, gradient, start, damping)
    # phi <- mu phi + x
    return {n: kept[n] + x for n, x in solved.solution.items()}, solved


def _space(rule: Rule, curvature: Any, leaves: Leaves) -> Space:
    curvature = require_curvature(rule.where, "the kernel of the samples", curvature)
    if not hasattr(curvature, "linearize"):
        raise ValueError(
            f"{rule.where}.update: `curvature` is {type(curvature).__name__} without linearize(); "
            "expected what `ggn(predict).at(params, *args)` returns, see kfac_optax.Curvature."
        )
    jacobian = curvature.linearize(sampled=rule.sampled, axis_name=rule.axis_name)
    dtype = wide_dtype(leaves)
    return sample_space(
        f"{rule.where}.update", jacobian, curvature.params, tuple(leaves), dtype, rule.axis_name
    )


def _check_divisible(rule: Rule, damping: Any, start: Any) -> None:
    # whether a traced damping is zero cannot be seen here
    if start is None and rule.cutoff is None and isinstance(damping, (int, float)) and damping == 0:
        raise ValueError(
            f"{rule.where}.update: damping=0, by which the formula for a gradient divides; expected "
            "damping > 0, cutoff= (a pseudo-inverse), or residual=, of which a regular kernel is "
            "all that is asked."
        )


def _solve(
    rule: Rule,
    curvature: Any,
    space: Space,
    gradient: Leaves,
    start: Any,
    damping: Any,
) -> Solved:
    """`(F + damping I)^{-1}` of the gradient, or of `J^T start / sqrt(N)`."""
    dtype = wide_dtype(gradient)
    # column by column with products, or at once from rows of layers
    if rule.layers is None:
        kernel = kernel_of(space.forward, space.adjoint, space.size, dtype, chunk=rule.chunk)
    else:
        rows = rows_of_gradient(
            rule.where, curvature, rule.layers, gradient, rule.sampled, rule.axis_name
        )
        kernel = kernel_of_rows(rows, space, dtype, rule.axis_name)
    # a batch in which nothing counts says nothing about the metric
    usable = all_finite((kernel, gradient)) & (jnp.trace(kernel) > 0)
    _check_divisible(rule, damping, start)
    inverse = factor_kernel(kernel, damping, cutoff=rule.cutoff)
    # (V - J^T (J J^T + N damping I)^{-1} J V) / damping
    if start is None:
        solution = solve_in_parameters(
            inverse, space.forward, space.adjoint, gradient, refine=rule.refine
        )
    else:
        # J^T (J J^T + N damping I)^{-1} residual, which never divides by the damping
        gradient = space.adjoint(start)
        solution = solve_in_samples(inverse, space.adjoint, start)
    # by exact products, also where the kernel was made of rows
    left = residual_of(space.forward, space.adjoint, inverse.damping, solution, gradient)
    # |g - (F + damping I) x| / |g|
    size = inner(gradient, gradient)
    square = inner(left, left) / jnp.where(size > 0, size, 1)
    error = jnp.sqrt(square).astype(jnp.float32)
    usable = usable & all_finite((solution, error))
    return Solved(solution, error, usable)
