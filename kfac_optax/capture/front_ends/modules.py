"""Geometry of Flax modules, read from attributes that linen and NNX share:
`(input of the dense view, geometry)`.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen.linear as linen_linear
import jax
import jax.numpy as jnp
import numpy as np

from kfac_optax._types import Staircase
from kfac_optax.capture.front_ends.unusual_convolutions import unshared, wrapped
from kfac_optax.capture.geometry import (
    Contraction,
    Conv,
    Dense,
    Geometry,
    Lookup,
    ScaleShift,
    Unsupported,
)
from kfac_optax.capture.patches import Window
from kfac_optax.linalg.staircase import staircase

Described = tuple[jax.Array, Geometry]

# what Flax pads itself, and with which mode of `jnp.pad`
_PADDED = {"CIRCULAR": "wrap", "REFLECT": "reflect", "CAUSAL": "constant"}


def dense(module: Any, inputs: jax.Array) -> Described:
    """`Dense`, `Linear`."""
    return inputs, Dense()


def dense_general(module: Any, inputs: jax.Array) -> Described:
    """`DenseGeneral`, `LinearGeneral`: contracts some axes, may batch over leading ones."""
    n = inputs.ndim
    # linen and NNX have other words for the same
    batch = getattr(module, "batch_dims", None)
    if batch is None:
        batch = tuple(module.batch_axis)
    features = getattr(module, "features", None)
    if features is None:
        features = module.out_features
    features = _tuple(features)
    axes = [axis % n for axis in _tuple(module.axis)]
    batch = [axis % n for axis in _tuple(batch)]
    # what is neither contracted nor batched
    rows = [axis for axis in range(n) if axis not in (*axes, *batch)]
    if not batch and axes == [n - 1] and len(features) == 1:
        return inputs, Dense()
    # the kernel has the axes batch, inputs, outputs; the output batch, rows, outputs
    outputs = len(features)
    kernel = len(batch) + len(axes) + outputs
    s = len(batch) + len(rows) + outputs
    of_rows = range(len(batch), len(batch) + len(rows))
    order_in_s = (*of_rows, *range(len(batch)), *range(s - outputs, s))
    order_in_a = (*rows, *batch, *axes)
    return inputs, Contraction(
        a=tuple(axis - n for axis in order_in_a),
        s=tuple(axis - s for axis in order_in_s),
        kernel=tuple(range(-kernel, 0)),
        rows=len(rows),
        groups=len(batch),
        inputs=len(axes),
        outputs=outputs,
    )


def einsum(
    module: Any,
    inputs: jax.Array,
    einsum_str: str | None = None,
) -> Described:
    """`Einsum`: any product of two operands in which every axis has a role."""
    kernel = getattr(module, "shape", None) or module.kernel_shape
    equation = einsum_str or module.einsum_str
    return inputs, contraction(equation, inputs.ndim, len(kernel))


def contraction(equation: str, a_rank: int, kernel_rank: int) -> Geometry:
    """Geometry of `jnp.einsum(equation, a, kernel)`.

    >>> contraction("ntd,dhk->nthk", 3, 3).inputs
    1
    """
    # labels of both operands and of the result; letters that are free stand for `...`
    operands, result = equation.replace(" ", "").split("->")
    left, right = operands.split(",")
    spare = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in equation]
    named = len(left.replace("...", ""))
    dots = "".join(spare[: a_rank - named])
    left = left.replace("...", dots)
    result = result.replace("...", dots)
    unnamed = "." in right or len(right) != kernel_rank
    if unnamed or len(left) != a_rank:
        return Unsupported(f"einsum {equation!r} names the kernel's axes by '...'")
    # each axis has one role, or the product is no matrix product
    repeats = [len(set(labels)) != len(labels) for labels in (left, right, result)]
    if any(repeats):
        return Unsupported(f"einsum {equation!r} takes a diagonal")
    alone = set(left) ^ set(right)
    if alone - set(result):
        return Unsupported(f"einsum {equation!r} sums over an axis of one operand alone")
    # roles of the axes
    rows = [c for c in left if c not in right]
    groups = [c for c in result if c in left and c in right]
    inputs = [c for c in left if c in right and c not in result]
    outputs = [c for c in result if c in right and c not in left]
    if not outputs or not inputs:
        return Unsupported(f"einsum {equation!r} is no matrix product")
    # a dense layer where the axes are in its order already
    a_order, s_order = "".join(rows + inputs), "".join(rows + outputs)
    k_order = "".join(inputs + outputs)
    in_order = (left, right, result) == (a_order, k_order, s_order)
    one_each = len(inputs) == len(outputs) == 1
    if in_order and one_each and not groups:
        return Dense()

    def axes(labels: str, order: Sequence[str]) -> tuple[int, ...]:
        return tuple(labels.index(c) - len(labels) for c in order)

    return Contraction(
        a=axes(left, rows + groups + inputs),
        s=axes(result, rows + groups + outputs),
        kernel=axes(right, groups + inputs + outputs),
        rows=len(rows),
        groups=len(groups),
        inputs=len(inputs),
        outputs=len(outputs),
    )


def conv(module: Any, inputs: jax.Array) -> Described:
    """`Conv`: padding that is not zeros is applied here, so that the geometry sees zeros only."""
    # what is no convolution with one kernel is left out, with the reason
    shared = getattr(module, "shared_weights", True)
    function = getattr(module, "conv_general_dilated", None)
    made_by = getattr(module, "conv_general_dilated_cls", None)
    if made_by or function not in (None, jax.lax.conv_general_dilated):
        return inputs, Unsupported("a convolution by a function of the user")
    mask = None
    if module.mask is not None:
        mask = _stairs(module.mask) if shared else None
        if mask is None or module.feature_group_count != 1:
            return inputs, Unsupported(
                "its weights are masked, and not by a staircase of constants"
            )
    size = _tuple(module.kernel_size)
    per_axis = functools.partial(_per_axis, axes=len(size))
    spread = per_axis(module.kernel_dilation)
    dilation = per_axis(module.input_dilation)
    # extent of the kernel with its dilation
    reach = [(k - 1) * d + 1 for k, d in zip(size, spread, strict=True)]
    padding = linen_linear.canonicalize_padding(module.padding, len(size))
    front = inputs.ndim - len(size) - 1
    # other values than zeros, or more on one side: padded here, as Flax does
    mode = _PADDED.get(padding) if isinstance(padding, str) else None
    if mode is not None:
        pads = [((k - 1) // 2, k // 2) for k in reach]
        if padding == "CAUSAL":
            pads = [(k - 1, 0) for k in reach]
        # spatial axes alone
        nothing = (0, 0)
        widths = [nothing] * front + pads + [nothing]
        inputs = jnp.pad(inputs, widths, mode=mode)
        padding = "VALID"
    strides = per_axis(module.strides)
    pads = resolve_padding(inputs.shape[front:-1], reach, strides, dilation, padding)
    if not shared:
        options = dict(window_strides=strides, padding=pads)
        options |= dict(lhs_dilation=dilation, rhs_dilation=spread)
        return unshared(inputs, len(size), options, size)
    window = Window(size, strides, pads, dilation, spread)
    return inputs, Conv(window, module.feature_group_count, mask=mask)


def _stairs(mask: Any) -> Staircase | None:
    """What a mask of the shape of the kernel is, if its rows are nested and it is known."""
    try:
        # by NumPy: while tracing JAX would make a constant a traced value
        known = np.asarray(mask)
        return staircase(known.reshape(-1, known.shape[-1]))
    except (TypeError, ValueError):
        return None


def resolve_padding(
    spatial: Sequence[int],
    reach: Sequence[int],
    strides: Sequence[int],
    dilation: Sequence[int],
    padding: Any,
) -> tuple[tuple[int, int], ...]:
    """Padding as pairs; `reach` is the size of the dilated window."""
    if isinstance(padding, str):
        # extent of the input with zeros between its values
        sizes = zip(spatial, dilation, strict=True)
        spread = [(n - 1) * d + 1 for n, d in sizes]
        padding = jax.lax.padtype_to_pads(spread, reach, strides, padding)
    return tuple((int(low), int(high)) for low, high in padding)


def conv_transpose(module: Any, inputs: jax.Array) -> Described:
    """`ConvTranspose`: an ordinary convolution of the input with zeros between its values."""
    if module.mask is not None:
        return inputs, Unsupported("its weights are masked")
    size = _tuple(module.kernel_size)
    strides = _per_axis(module.strides, len(size))
    spread = _per_axis(module.kernel_dilation, len(size))
    padding = linen_linear.canonicalize_padding(module.padding, len(size))
    make = functools.partial(transposed, size, strides, flipped=module.transpose_kernel)
    if padding == "CIRCULAR":
        return wrapped(inputs, make("VALID", spread))
    return inputs, make(padding, spread)


def transposed(
    size: Sequence[int],
    strides: Sequence[int],
    padding: Any,
    spread: Sequence[int],
    *,
    flipped: bool = False,
) -> Conv:
    """Geometry of `jax.lax.conv_transpose`, whose padding JAX itself resolves."""
    n = len(size)
    call = functools.partial(
        jax.lax.conv_transpose,
        strides=strides,
        padding=padding,
        rhs_dilation=spread,
        transpose_kernel=flipped,
    )
    # traced, not computed: JAX writes the convolution that it makes of it into the jaxpr
    spatial = (math.prod(size) + 1,) * n
    example = jax.ShapeDtypeStruct((1, *spatial, 1), jnp.float32)
    kernel = jax.ShapeDtypeStruct((*size, 1, 1), jnp.float32)
    equations = jax.make_jaxpr(call)(example, kernel).jaxpr.eqns
    (eqn,) = [e for e in equations if e.primitive.name == "conv_general_dilated"]
    p = eqn.params
    window = Window(
        tuple(size),
        tuple(p["window_strides"]),
        tuple(map(tuple, p["padding"])),
        tuple(p["lhs_dilation"]),
        tuple(p["rhs_dilation"]),
    )
    return Conv(window, 1, flipped)


def embedding(module: Any, inputs: jax.Array) -> Described:
    """`Embed`."""
    if module.num_embeddings == 1:  # broadcast without a look-up
        return jnp.zeros_like(inputs), Lookup(1)
    return inputs, Lookup(module.num_embeddings)


def norm(module: Any, inputs: jax.Array) -> Geometry:
    """Geometry of scale and shift of a normalisation layer."""
    # linen and NNX again; axes from the end, in rising order
    axes = getattr(module, "feature_axes", None)
    if axes is None:
        axes = getattr(module, "axis", -1)
    rank = inputs.ndim
    from_end = [axis % rank - rank for axis in _tuple(axes)]
    return ScaleShift(tuple(sorted(from_end)))


def _tuple(x: Any) -> tuple:
    return tuple(x) if isinstance(x, Sequence) else (x,)


def _per_axis(x: Any, axes: int) -> tuple[int, ...]:
    if isinstance(x, Sequence):
        return tuple(x)
    return (1 if x is None else x,) * axes
