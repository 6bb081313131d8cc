"""Damped natural gradient in sample space, with the momentum of SPRING, as a transformation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfac_optax._tree import all_finite, inner, named_leaves, replace_leaves, wide_dtype
from kfac_optax._types import Layers, PyTree, ScalarOrSchedule
from kfac_optax._validate import (
    check_legal,
    check_number,
    check_real,
    checked,
    start_checked,
)
from kfac_optax.engine.state import SampleSpaceState
from kfac_optax.linalg.smw import (
    factor_kernel,
    kernel_of,
    residual_of,
    solve_in_parameters,
    solve_in_samples,
)
from kfac_optax.methods.sample_space.from_rows import kernel_of_rows, rows_of_gradient
from kfac_optax.methods.sample_space.space import Leaves, Space, sample_space
from kfac_optax.step_rules._per_layer import require_curvature, within

_TOO_MUCH = 0.1  # share of the gradient that a solve may leave


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


class _Solved(NamedTuple):
    solution: Leaves
    error: jax.Array
    usable: jax.Array  # bool


def scale_by_samples(rule: Rule) -> optax.GradientTransformationExtraArgs:
    """`x = (F + damping I)^{-1} (g - momentum F phi)`, `phi <- momentum phi + x`."""
    _check(rule)
    hyper = {"damping": rule.damping}
    if rule.momentum is not None:
        hyper["momentum"] = rule.momentum

    def init(params: PyTree) -> SampleSpaceState:
        check_real(rule.where, named_leaves(params))
        previous, wide = None, wide_dtype(params)
        if rule.momentum is not None:
            previous = jax.tree.map(lambda x: jnp.zeros(x.shape, wide), params)
        counts = [jnp.zeros((), jnp.int32) for _ in range(3)]
        error = jnp.zeros((), jnp.float32)
        return SampleSpaceState(previous, *counts, error, start_checked(**hyper))

    def update(
        updates: PyTree,
        state: Any,
        params: PyTree | None = None,
        *,
        curvature: Any = None,
        residual: PyTree = None,
        damping: Any = None,
        **extra: Any,
    ) -> tuple[PyTree, SampleSpaceState]:
        del params, extra
        if not jax.tree.leaves(updates):
            return updates, state
        leaves = named_leaves(updates)
        check_real(rule.where, leaves)
        damping = rule.damping if damping is None else damping
        damping, given = checked(state.given, "damping", damping, state.sample_count)
        momentum = None
        if rule.momentum is not None:
            momentum, given = checked(given, "momentum", rule.momentum, state.sample_count)
        with jax.named_scope("kfac/sample_space"):
            new, solved = _step(rule, state, leaves, curvature, residual, damping, momentum)
        zeroed = {n: jnp.where(solved.usable, x, 0) for n, x in new.items()}
        cast = {n: within(x, leaves[n].dtype) for n, x in zeroed.items()}
        state = state._replace(
            sample_count=optax.safe_increment(state.sample_count),
            skipped_steps=state.skipped_steps + (~solved.usable).astype(jnp.int32),
            inexact_solves=state.inexact_solves + _inexact(rule, solved).astype(jnp.int32),
            solve_error=jnp.where(solved.usable, solved.error, state.solve_error),
            given=given,
        )
        if momentum is not None:
            old = named_leaves(state.previous_update)
            kept = {n: jnp.where(solved.usable, x, old[n]) for n, x in new.items()}
            state = state._replace(previous_update=replace_leaves(state.previous_update, kept))
        return replace_leaves(updates, cast), state

    return optax.GradientTransformationExtraArgs(init, update)


def _inexact(rule: Rule, solved: _Solved) -> jax.Array:
    """A cutoff leaves a part of the gradient on purpose."""
    return solved.usable & (solved.error > _TOO_MUCH) & (rule.cutoff is None)


def _check(rule: Rule) -> None:
    check_legal(rule.where, "damping", rule.damping)
    if rule.momentum is not None:
        check_legal(rule.where, "momentum", rule.momentum)
    if rule.cutoff is not None:
        check_number(rule.where, "cutoff", rule.cutoff, above=0, at_most=1)
    check_number(rule.where, "chunk", rule.chunk, at_least=1)
    check_number(rule.where, "refine", rule.refine, at_least=0)


def _step(
    rule: Rule,
    state: SampleSpaceState,
    leaves: Leaves,
    curvature: Any,
    residual: PyTree,
    damping: Any,
    momentum: Any,
) -> tuple[Leaves, _Solved]:
    """The new direction and how it was solved for; nothing is read of a batch that is not finite."""
    space = _space(rule, curvature, leaves)
    dtype = wide_dtype(leaves)
    gradient = {n: x.astype(dtype) for n, x in leaves.items()}
    start = None if residual is None else space.flat(residual)
    if momentum is None:
        solved = _solve(rule, curvature, space, gradient, start, damping)
        return solved.solution, solved
    momentum = jnp.asarray(momentum, dtype)
    previous = {n: momentum * x for n, x in named_leaves(state.previous_update).items()}
    there = space.forward(previous)
    if start is None:
        back = space.adjoint(there)
        gradient = {n: x - back[n] for n, x in gradient.items()}
    else:
        start = start - there
    solved = _solve(rule, curvature, space, gradient, start, damping)
    return {n: previous[n] + x for n, x in solved.solution.items()}, solved


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


def _solve(
    rule: Rule, curvature: Any, space: Space, gradient: Leaves, start: Any, damping: Any
) -> _Solved:
    """`(F + damping I)^{-1}` of the gradient, or of `J^T start / sqrt(N)`."""
    dtype = wide_dtype(gradient)
    if rule.layers is None:
        kernel = kernel_of(space.forward, space.adjoint, space.size, dtype, chunk=rule.chunk)
    else:
        rows = rows_of_gradient(
            rule.where, curvature, rule.layers, gradient, rule.sampled, rule.axis_name
        )
        kernel = kernel_of_rows(rows, space, dtype, rule.axis_name)
    # a batch in which nothing counts says nothing about the metric
    usable = all_finite((kernel, gradient)) & (jnp.trace(kernel) > 0)
    inverse = factor_kernel(kernel, damping, cutoff=rule.cutoff)
    if start is None:
        solution = solve_in_parameters(
            inverse, space.forward, space.adjoint, gradient, refine=rule.refine
        )
    else:
        gradient = space.adjoint(start)
        solution = solve_in_samples(inverse, space.adjoint, start)
    left = residual_of(space.forward, space.adjoint, inverse.damping, solution, gradient)
    size = inner(gradient, gradient)
    error = jnp.sqrt(inner(left, left) / jnp.where(size > 0, size, 1)).astype(jnp.float32)
    usable = usable & all_finite((solution, error))
    return _Solved(solution, error, usable)
