"""A tanh network with its derivatives in one forward pass, every row of which meets the weights.

Of each point the value, the directional derivatives and the Laplacian go through a layer as rows of
one product, so that K-FAC measures all of them. Weights are `[inputs + 1, outputs]`, the bias in
the last row: only values meet it, so their last input is 1 and that of derivatives 0.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

import kfac_optax as ko

Params = dict[str, jax.Array]


class Jet(NamedTuple):
    """A function of points `[N, d]` and its derivatives there."""

    value: jax.Array  # [N, q]
    slopes: jax.Array  # [N, d, q]
    laplacian: jax.Array  # [N, q], over some of the axes


def init(key: jax.Array, sizes: Sequence[int], dtype: jnp.dtype) -> Params:
    """Weights of a network of these widths, inputs and outputs included; biases are zero.

    >>> params = init(jax.random.key(0), (2, 8, 1), jnp.float32)
    >>> print({name: weight.shape for name, weight in params.items()})
    {'layer0': (3, 8), 'layer1': (9, 1)}
    """
    params = {}
    for i, (p, q) in enumerate(itertools.pairwise(sizes)):
        weight = jax.random.normal(jax.random.fold_in(key, i), (p, q), dtype) / math.sqrt(p)
        params[f"layer{i}"] = jnp.concatenate([weight, jnp.zeros((1, q), dtype)])
    return params


def network(params: Params, x: jax.Array) -> jax.Array:
    """Values `[N]` of the network at points `[N, d]`.

    >>> print(network({"layer0": jnp.ones((3, 1))}, jnp.array([[1.0, 2.0]])))
    [4.]
    """
    *hidden, last = params.values()
    for weight in hidden:
        x = jnp.tanh(_dense(weight, x, jnp.ones(())))
    return _dense(last, x, jnp.ones(()))[:, 0]


def network_jet(params: Params, x: jax.Array, times: int = 0) -> Jet:
    """The network with slopes along all axes and the Laplacian over all but the first `times`; `q = 1`.

    >>> params = {"layer0": jnp.array([[1.0], [0.0]]), "layer1": jnp.array([[2.0], [0.0]])}
    >>> jet = network_jet(params, jnp.zeros((1, 1)))  # 2 tanh(x)
    >>> print(jet.value.ravel(), jet.slopes.ravel(), jet.laplacian.ravel())
    [0.] [2.] [0.]

    Reference: Dangel, Mueller & Zeinhofer, Kronecker-Factored Approximate Curvature for
      Physics-Informed Neural Networks (2024), on the forward Laplacian and its rows.
    """
    n, d = x.shape
    slopes = jnp.broadcast_to(jnp.eye(d, dtype=x.dtype), (n, d, d))
    jet = Jet(x, slopes, jnp.zeros_like(x))
    *hidden, last = params.values()
    for weight in hidden:
        jet = _tanh(_dense_jet(weight, jet), times)
    return _dense_jet(last, jet)


def _dense(weight: jax.Array, rows: jax.Array, ones: jax.Array) -> jax.Array:
    """`(rows, ones) @ weight`, tapped."""
    last = jnp.broadcast_to(ones.astype(rows.dtype), (*rows.shape[:-1], 1))
    inputs = jnp.concatenate([rows, last], -1)
    return ko.tap_dense(inputs @ weight, inputs, weight)


def _dense_jet(weight: jax.Array, jet: Jet) -> Jet:
    # value, slopes and Laplacian are rows on axis 1
    rows = jnp.concatenate([jet.value[:, None], jet.slopes, jet.laplacian[:, None]], 1)
    is_value = (jnp.arange(rows.shape[1]) == 0)[:, None]
    out = _dense(weight, rows, is_value)
    return Jet(out[:, 0], out[:, 1:-1], out[:, -1])


def _tanh(jet: Jet, times: int) -> Jet:
    """`tanh(f)`: slopes `f' df`, Laplacian `f' L + f'' sum_i (d_i f)^2`."""
    y = jnp.tanh(jet.value)
    first = 1 - y**2
    second = -2 * y * first
    squares = jnp.sum(jet.slopes[:, times:] ** 2, 1)
    return Jet(y, first[:, None] * jet.slopes, first * jet.laplacian + second * squares)
