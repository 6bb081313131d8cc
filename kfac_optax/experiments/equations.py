"""Partial differential equations on the unit cube whose solutions are known."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kfac_optax.experiments.jets import Jet

DIFFUSIVITY = 0.25  # of the heat equation


class Equation(NamedTuple):
    """`residual = 0` inside of `[0, 1]^d`, `u = solution` on a part of its boundary.

    Attributes:
      dimensions: `d`, time included.
      times: the first `times` axes are time, which the Laplacian leaves out.
      solution: points `[N, d]` to values `[N]`.
      residual: the jet of a function at points `[N, d]`, and these, to `[N]`.
    """

    dimensions: int
    times: int
    solution: Callable[[jax.Array], jax.Array]
    residual: Callable[[Jet, jax.Array], jax.Array]


def poisson_sines(dimensions: int) -> Equation:
    """`-Laplacian u = d pi^2 u*` with `u* = prod_i sin(pi x_i)`, zero on the boundary.

    >>> print(poisson_sines(2).solution(jnp.array([[0.5, 0.5]])))
    [1.]
    """

    def solution(x: jax.Array) -> jax.Array:
        return jnp.prod(jnp.sin(math.pi * x), -1)

    def residual(jet: Jet, x: jax.Array) -> jax.Array:
        return -jet.laplacian[:, 0] - dimensions * math.pi**2 * solution(x)

    return Equation(dimensions, 0, solution, residual)


def poisson_cosines(dimensions: int) -> Equation:
    """`-Laplacian u = pi^2 u*` with `u* = sum_i cos(pi x_i)`, which is what the boundary has.

    >>> print(poisson_cosines(5).solution(jnp.zeros((1, 5))))
    [5.]
    """

    def solution(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.cos(math.pi * x), -1)

    def residual(jet: Jet, x: jax.Array) -> jax.Array:
        return -jet.laplacian[:, 0] - math.pi**2 * solution(x)

    return Equation(dimensions, 0, solution, residual)


def heat(dimensions: int) -> Equation:
    """`du/dt = Laplacian u / 4` in `dimensions` of space, from `prod_i sin(pi x_i)` at time zero on.

    `u* = exp(-d pi^2 t / 4) prod_i sin(pi x_i)`; time is the first axis.

    >>> print(heat(1).solution(jnp.array([[0.0, 0.5]])))
    [1.]
    """
    rate = dimensions * math.pi**2 * DIFFUSIVITY

    def solution(x: jax.Array) -> jax.Array:
        return jnp.exp(-rate * x[:, 0]) * jnp.prod(jnp.sin(math.pi * x[:, 1:]), -1)

    def residual(jet: Jet, x: jax.Array) -> jax.Array:
        return jet.slopes[:, 0, 0] - DIFFUSIVITY * jet.laplacian[:, 0]

    return Equation(1 + dimensions, 1, solution, residual)


EQUATIONS = {"poisson_sines": poisson_sines, "poisson_cosines": poisson_cosines, "heat": heat}


def inside(key: jax.Array, count: int, equation: Equation, dtype: jnp.dtype) -> jax.Array:
    """Points `[count, d]`, uniform in the cube."""
    return jax.random.uniform(key, (count, equation.dimensions), dtype)


def boundary(key: jax.Array, count: int, equation: Equation, dtype: jnp.dtype) -> jax.Array:
    """Points `[count, d]`, uniform on the faces of the cube where values are given: all of them,
    but of time only the first.

    >>> points = boundary(jax.random.key(0), 100, heat(1), jnp.float32)
    >>> print(sorted({axis for axis in range(2) if (points[:, axis] == 0).any()}))
    [0, 1]
    """
    point_key, face_key = jax.random.split(key)
    points = inside(point_key, count, equation, dtype)
    # faces in a row: the start of every time, then both sides of every axis of space
    times, faces = equation.times, 2 * equation.dimensions - equation.times
    face = jax.random.randint(face_key, (count,), 0, faces)
    axis = jnp.where(face < times, face, times + (face - times) // 2)
    side = jnp.where(face < times, 0, (face - times) % 2)
    on_face = jnp.arange(equation.dimensions) == axis[:, None]
    return jnp.where(on_face, side[:, None].astype(dtype), points)
