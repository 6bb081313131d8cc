"""A small FermiNet for one atom, in plain JAX: determinants of orbitals that see all electrons.

Electrons `[*batch, n, 3]` come spin up first, the nucleus is at the origin, and leading axes are
walkers. Each electron has a stream of features, each pair another one; layers are shared over
electrons and over pairs, so that orbitals permute with their electrons and determinants change
sign. Cusps are up to the distances among the features.

Reference: Pfau, Spencer, Matthews & Foulkes, Ab initio solution of the many-electron Schroedinger
  equation with deep neural networks (2020), equations (3) to (8).
"""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import kfac_optax as ko

Params = dict[str, Any]


class Atom(NamedTuple):
    """A nucleus and its electrons."""

    charge: int
    up: int
    down: int

    @property
    def electrons(self) -> int:
        """Their number."""
        return self.up + self.down

    @property
    def spins(self) -> dict[str, slice]:
        """Where the electrons of each spin stand, spins without electrons left out."""
        found = {"up": slice(0, self.up), "down": slice(self.up, self.electrons)}
        return {name: s for name, s in found.items() if s.stop > s.start}


class Widths(NamedTuple):
    """Sizes of the network."""

    one: int = 32  # features of an electron
    two: int = 8  # of a pair
    depth: int = 2
    determinants: int = 4


def init(key: jax.Array, atom: Atom, widths: Widths) -> Params:
    """Random parameters, a tree of dense layers.

    >>> params = init(jax.random.key(0), Atom(2, 1, 1), Widths(depth=1))
    >>> print(params["layers"][0]["one"]["w"].shape, params["up"]["orbitals"]["w"].shape)
    (20, 32) (32, 4)
    """
    keys = map(jax.random.fold_in, itertools.repeat(key), itertools.count())
    spins = len(atom.spins)
    layers, one, two = [], 4, 4
    for i in range(widths.depth):
        # an electron sees itself, the means of both spins, and the means of its pairs with them
        layer = {"one": _dense(next(keys), (1 + spins) * one + spins * two, widths.one)}
        if i < widths.depth - 1:  # what pairs make of the last layer nobody reads
            layer["two"] = _dense(next(keys), two, widths.two)
        layers.append(layer)
        one, two = widths.one, widths.two
    params: Params = {"layers": layers}
    for name, spin in atom.spins.items():
        count = widths.determinants * (spin.stop - spin.start)
        orbitals = _dense(next(keys), one, count)
        params[name] = {"orbitals": orbitals, "decay": {"w": jnp.ones((1, count))}}
    return params


def log_psi(params: Params, x: jax.Array, atom: Atom) -> tuple[jax.Array, jax.Array]:
    """Sign of the wave function and logarithm of its absolute value.

    `psi(x) = sum_k prod_spin det[phi^k_i(x_j)]`.

    Args:
      params: made by `init`.
      x: positions, `[*batch, n, 3]`.
      atom: whose electrons.

    Returns:
      Two arrays `[*batch]`.
    """
    spins = list(atom.spins.values())
    one, two = features(x)
    for layer in params["layers"]:
        new = jnp.tanh(_apply(_mixed(one, two, spins), layer["one"]))
        one = one + new if new.shape == one.shape else new
        if "two" in layer:
            new = jnp.tanh(_apply(two, layer["two"]))
            two = two + new if new.shape == two.shape else new
    radius = jnp.linalg.norm(x, axis=-1, keepdims=True)
    sign, log = 1.0, 0.0
    for name, spin in atom.spins.items():
        part = params[name]
        phi = _apply(one[..., spin, :], part["orbitals"])
        phi = phi * jnp.exp(-_apply(radius[..., spin, :], part["decay"]))
        signs, logs = _determinants(phi)
        sign, log = sign * signs, log + logs
    log, sign = jax.nn.logsumexp(log, axis=-1, b=sign, return_sign=True)
    return sign, log


def features(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Position and distance of every electron, `[*batch, n, 4]`, and of every pair,
    `[*batch, n, n, 4]`.
    """
    radius = jnp.linalg.norm(x, axis=-1, keepdims=True)
    apart = x[..., :, None, :] - x[..., None, :, :]
    return jnp.concatenate([x, radius], -1), jnp.concatenate([apart, distances(x)[..., None]], -1)


def distances(x: jax.Array) -> jax.Array:
    """`|x_i - x_j|`, `[*batch, n, n]`, with derivatives (zero) on the diagonal too.

    >>> print(distances(jnp.array([[0.0, 0.0, 0.0], [0.0, 3.0, 4.0]])))
    [[0. 5.]
     [5. 0.]]
    """
    apart = x[..., :, None, :] - x[..., None, :, :]
    same = jnp.eye(x.shape[-2])
    # the root of zero has no derivative
    return jnp.sqrt(jnp.sum(apart**2, -1) + same) * (1 - same)


def _mixed(one: jax.Array, two: jax.Array, spins: list[slice]) -> jax.Array:
    means = [jnp.mean(one[..., spin, :], -2, keepdims=True) for spin in spins]
    of_all = [jnp.broadcast_to(mean, one.shape) for mean in means]
    of_pairs = [jnp.mean(two[..., spin, :], -2) for spin in spins]
    return jnp.concatenate([one, *of_all, *of_pairs], -1)


def _determinants(phi: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Signs and logarithms of `[*batch, n, K n]`, both `[*batch, K]`."""
    n = phi.shape[-2]
    matrices = jnp.moveaxis(phi.reshape(*phi.shape[:-1], -1, n), -2, -3)
    if n == 1:  # saves the derivatives of a factorisation
        return jnp.sign(matrices[..., 0, 0]), jnp.log(jnp.abs(matrices[..., 0, 0]))
    signs, logs = jnp.linalg.slogdet(matrices)
    return signs, logs


def _dense(key: jax.Array, inputs: int, outputs: int) -> Params:
    key, bias_key = jax.random.split(key)
    w = jax.random.normal(key, (inputs, outputs)) / jnp.sqrt(inputs)
    return {"w": w, "b": jax.random.normal(bias_key, (outputs,))}


def _apply(x: jax.Array, layer: Params) -> jax.Array:
    s = x @ layer["w"]
    if "b" not in layer:
        return ko.tap_dense(s, x, layer["w"])
    return ko.tap_dense(s + layer["b"], x, layer["w"], layer["b"])
