"""Derivatives of a model along directions of its parameters, also where it has rules for the way
back alone.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from kfac_optax._tree import trains
from kfac_optax._types import PyTree
from kfac_optax.capture.jaxpr.calls import has_rule_back_only

_NOT_LINEAR = (
    "linearized: the backward rule of a custom_vjp in the model cannot be transposed; expected one "
    "that is linear in the cotangent, without stop_gradient of it. One that clips or rounds the "
    "gradient has no product J v: apply it to the gradient itself, outside of the model, or give "
    "the function a custom_jvp."
)


def linearized(
    function: Callable[[PyTree], tuple[PyTree, Any]], params: PyTree
) -> tuple[Callable[[PyTree], PyTree], Any]:
    """`J v` for directions `v`, and what the function returns besides.

    Functions with `custom_vjp` cannot be derived forward: their `J^T` is transposed instead, so that
    products are those of the rule that gradients follow. It has to be linear in the cotangent.

    Args:
      function: parameters to `(outputs, other)`.
      params: where it is linearised.

    Raises:
      ValueError: a `custom_vjp` has a rule that cannot be transposed, as one that clips gradients.

    >>> import jax.numpy as jnp
    >>> @jax.custom_vjp
    ... def reversed_gradient(x):
    ...     return x
    >>> reversed_gradient.defvjp(lambda x: (x, None), lambda _, g: (-g,))
    >>> along, _ = linearized(lambda x: (reversed_gradient(2 * x), None), jnp.ones(2))
    >>> print(along(jnp.array([1.0, 3.0])))
    [-2. -6.]
    """
    _, along, other = jax.linearize(function, params, has_aux=True)
    # integers have no directions to trace it with
    real = all(map(trains, jax.tree.leaves(params)))
    if not real:
        return lambda direction: along(_tangents(params, direction)), other
    if not has_rule_back_only(jax.make_jaxpr(along)(params).jaxpr):
        return along, other
    outputs, pull, other = jax.vjp(function, params, has_aux=True)
    # J^T u is linear in u, and its transpose is J v
    backward = jax.linear_transpose(lambda u: pull(u)[0], outputs)

    def transposed(direction: PyTree) -> PyTree:
        try:
            (tangents,) = backward(direction)
        except jax.errors.JaxRuntimeError:  # of the device, as where memory runs out
            raise
        except (RuntimeError, AssertionError) as problem:
            raise ValueError(_NOT_LINEAR) from problem
        return tangents

    return transposed, other


def _tangents(params: PyTree, direction: PyTree) -> PyTree:
    """A direction as JAX wants it: whole numbers and flags have none."""

    def tangent(parameter: jax.Array, along: Any) -> Any:
        return along if trains(parameter) else np.zeros(parameter.shape, jax.dtypes.float0)

    return jax.tree.map(tangent, params, direction)
