"""Parameters that are added to data, or stand beside it, where no equation of their own shows that."""

import functools
from collections.abc import Iterator, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from kfac_optax.capture.jaxpr.rewriting import rewritten
from kfac_optax.capture.kernels.expression import (
    DoesNotFit,
    Expression,
    Joined,
    Leaf,
    Negative,
    Sum,
)
from kfac_optax.capture.kernels.known import Known, is_real
from kfac_optax.capture.kernels.values import Values


def meets_by_parts(values: Values, eqn: Any, given: Sequence[Known]) -> list[Any] | None:
    """`[s_1, s_2] + [b_1, b_2]` as `[s_1 + b_1, s_2 + b_2]`, for a bias joined of several, or one
    that is a slice of parameters joined; so with a scale.
    """
    for side, v, s in _beside_data(eqn, given):
        # repeated along rows: axes of the parameters in the output
        base, axes = values.before_repeats(v)
        kernel = _joined(values, base)
        if kernel is None:
            continue
        leaves, axis, sizes = kernel
        parts = [s]
        if sizes:
            # the data may be joined of parts of the same sizes
            axis = axes[axis]
            parts = _parts_of(values, s, axis, sizes)
        function = functools.partial(_part_by_part, eqn, side, axis, sizes, axes, len(parts))
        operands = [*parts, *(x.value for x in leaves)]
        return rewritten(function, operands, eqn.outvars[0], eqn.source_info)
    return None


def _beside_data(eqn: Any, given: Sequence[Known]) -> Iterator[tuple[int, Any, Any]]:
    """Operands made of parameters that meet data: their place, they and the data."""
    for side in (0, 1):
        v, s = eqn.invars[side], eqn.invars[1 - side]
        made_of_parameters = given[side].is_kernel and is_real(v)
        if not given[1 - side].data or not made_of_parameters:
            continue
        # data that the parameters are broadcast to, and not the other way round
        if s.aval.shape == eqn.outvars[0].aval.shape:
            yield side, v, s


def _joined(values: Values, v: Any) -> tuple[list[Leaf], int, tuple[int, ...]] | None:
    """Parameters that a value is joined of, along which axis, and their sizes, none for one alone."""
    values.whole.clear()
    try:
        kernel = values.expression(v)
    except DoesNotFit:
        return None
    axis, sizes = 0, ()
    if isinstance(kernel, Joined) and kernel.sizes:
        parts, axis, sizes = kernel.parts, kernel.axis, kernel.sizes
    elif getattr(kernel, "value", v) is v:
        # itself: nothing is known that the program does not show
        return None
    else:
        parts = (kernel,)
    leaves = [x for x in parts if isinstance(x, Leaf)]
    some = any(values.look(x.value).is_parameter for x in leaves)
    return (leaves, axis, sizes) if some and len(leaves) == len(parts) else None


def _parts_of(values: Values, s: Any, axis: int, sizes: Sequence[int]) -> list[Any]:
    """What data is joined of, if of parts of these sizes along that axis; else itself."""
    eqn = None if isinstance(s, jex.Literal) else values.source.get(s)
    if eqn is None or eqn.primitive.name != "concatenate":
        return [s]
    found = [x.aval.shape[axis] for x in eqn.invars]
    alike = eqn.params["dimension"] == axis and found == list(sizes)
    return list(eqn.invars) if alike else [s]


def _part_by_part(
    eqn: Any,
    side: int,
    axis: int,
    sizes: Sequence[int],
    axes: Sequence[int],
    given: int,
    *values: Any,
) -> jax.Array:
    """The elementwise equation for each part of an operand and its part of the other, which may be
    given as one.
    """
    data, parameters = list(values[:given]), values[given:]
    if given < len(parameters):
        data = jnp.split(data[0], np.cumsum(sizes)[:-1], axis)
    # [s_1 op b_1, s_2 op b_2], operands in the order in which they were
    made = []
    for x, b in zip(data, parameters, strict=True):
        repeated = jax.lax.broadcast_in_dim(b.astype(x.dtype), x.shape, axes)
        pair = (x, repeated) if side else (repeated, x)
        made.append(eqn.primitive.bind(*pair, **eqn.params))
    return jnp.concatenate(made, axis) if len(made) > 1 else made[0]


def added_apart(values: Values, eqn: Any, given: Sequence[Known]) -> list[Any] | None:
    """`s + (b - c)` as `(s + b) - c`, for parameters that are added to each other first."""
    for side, v, s in _beside_data(eqn, given):
        base, axes = values.before_repeats(v)
        values.whole.clear()
        try:
            terms = _terms(values.expression(base), 1)
        except DoesNotFit:
            continue
        some = any(values.look(x.value).is_parameter for x, _ in terms)
        if len(terms) < 2 or not some:
            continue
        # s - v is s + (-v), v - s is -s + v
        of_s, of_v = 1, 1
        if eqn.primitive.name == "sub":
            of_s, of_v = (-1, 1) if side == 0 else (1, -1)
        signs = [of_v * sign for _, sign in terms]
        function = functools.partial(_one_after_another, axes, of_s, signs)
        operands = [s, *(x.value for x, _ in terms)]
        return rewritten(function, operands, eqn.outvars[0], eqn.source_info)
    return None


def _terms(kernel: Expression, sign: int) -> list[tuple[Leaf, int]]:
    """The leaves of a sum and their signs; none where it is made of anything else."""
    match kernel:
        case Leaf():
            return [(kernel, sign)]
        case Negative():
            return _terms(kernel.of, -sign)
        case Sum():
            first = _terms(kernel.first, sign)
            second = _terms(kernel.second, sign * kernel.sign)
            return first + second if first and second else []
        case _:
            return []


def _one_after_another(
    axes: Sequence[int], sign: int, signs: Sequence[int], s: jax.Array, *parameters: jax.Array
) -> jax.Array:
    s = s if sign > 0 else -s
    for b, plus in zip(parameters, signs, strict=True):
        b = jax.lax.broadcast_in_dim(b.astype(s.dtype), s.shape, axes)
        s = s + b if plus > 0 else s - b
    return s


def scaled_after(values: Values, eqn: Any, tapped: Set[int]) -> list[Any] | None:
    """`x (r scale)` as `(x r) scale`, where all rows of `x` share `r`: a batch's deviation, say."""
    for side in (0, 1):
        v, x = eqn.invars[side], eqn.invars[1 - side]
        base, axes = values.before_repeats(v)
        made = None if isinstance(base, jex.Literal) else values.source.get(base)
        if made is None or made.primitive.name != "mul":
            continue
        # all rows of the output are those of `x`, and `r scale` has fewer
        fewer = base.aval.size < x.aval.size
        if not fewer or x.aval.shape != eqn.outvars[0].aval.shape:
            continue
        for scale, r in (made.invars, reversed(made.invars)):
            view = values.look(scale).view
            if view is None or not view.complete or view.leaf in tapped:
                continue
            if values.look(r).data and scale.aval.shape == base.aval.shape:
                function = functools.partial(_one_by_one, axes)
                return rewritten(function, [x, r, scale], eqn.outvars[0], eqn.source_info)
    return None


def _one_by_one(axes: Sequence[int], x: jax.Array, *factors: jax.Array) -> jax.Array:
    for factor in factors:
        factor = factor.astype(x.dtype)
        x = x * jax.lax.broadcast_in_dim(factor, x.shape, axes if factor.ndim else ())
    return x


def beside_data(values: Values, eqn: Any, given: Sequence[Known]) -> list[Any] | None:
    """Parameters repeated along rows and put beside data, or in its place, as shifts of zeros."""
    # without data beside it there is nobody's example axis to take over
    rows = []
    for v, known in zip(eqn.invars, given, strict=True):
        if known.data and is_real(v) and 0 not in v.aval.shape:
            rows.append(v)
    # a token, or a position, that all examples share
    tokens = [v for v in eqn.invars if rows and _is_repeated(values, v)]
    if not tokens:
        return None
    shift = functools.partial(_shifted_zeros, eqn.params.get("dimension"))
    new: dict[Any, Any] = {}
    equations: list[Any] = []
    for v in tokens:
        new[v] = jex.Var(v.aval)
        equations += rewritten(shift, [rows[0], v], new[v], eqn.source_info)
    read = [v if isinstance(v, jex.Literal) else new.get(v, v) for v in eqn.invars]
    return [*equations, eqn.replace(invars=read)]


def _is_repeated(values: Values, v: Any) -> bool:
    view = values.look(v).view
    if view is None or not view.complete or not is_real(v):
        return False
    axes = zip(view.axes, v.aval.shape, strict=True)
    # an axis that no axis of the parameter is, of more than one row
    return any(axis is None and n > 1 for axis, n in axes)


def _shifted_zeros(axis: int | None, rows: jax.Array, token: jax.Array) -> jax.Array:
    """The token, added to zeros that have their examples where `rows` have theirs."""
    # along the axis of concatenation one row tells where the examples are
    one = rows if axis is None else jax.lax.slice_in_dim(rows, 0, 1, axis=axis)
    one = jnp.broadcast_to(one, token.shape).astype(token.dtype)
    never = jnp.zeros(token.shape, bool)
    return jax.lax.select(never, one, jnp.zeros_like(token)) + token
