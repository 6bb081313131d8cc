"""Orthogonal bases of SOAP: eigenvectors of statistics, followed by the power iteration."""

import jax
import jax.numpy as jnp

from kfac_optax._layout import varying_as
from kfac_optax._tree import all_finite, select
from kfac_optax._types import PyTree
from kfac_optax.linalg import lapack
from kfac_optax.linalg.factorize import psd_eigh
from kfac_optax.linalg.in_order import after
from kfac_optax.methods.gradient import gate
from kfac_optax.methods.gradient.axes import Group
from kfac_optax.methods.gradient.axis_products import along
from kfac_optax.methods.gradient.phases import ByAxis, diagonal_root

BASES = ("qr", "eigh")
_RIDGE = 1e-6  # of inverses in statistics, relative to the largest eigenvalue


def whiteners_of(factors: ByAxis, bases: ByAxis) -> ByAxis:
    """`W` with `W^T W = Q diag(Q^T H Q)^(-1) Q^T`, by axis."""
    made = {}
    for axis, q in bases.items():
        with jax.default_matmul_precision("highest"):
            products = factors[axis] @ q
            # q_j^T H q_j
            values = jnp.sum(q * products, axis=1)
        # a direction that rounding alone knows counts as much as one of this share
        roots = diagonal_root(values, 2, jnp.asarray(_RIDGE, q.dtype))
        made[axis] = roots[:, :, None] * q.mT
    return made


def rotated(
    tensors: jax.Array,
    bases: dict[str, jax.Array],
    *,
    back: bool,
) -> jax.Array:
    """Into the bases, `G x_i Q_i^T`, or back out of them."""
    for axis, q in bases.items():
        tensors = along(tensors, int(axis), q if back else q.mT)
    return tensors


def refreshed(
    groups: tuple[Group, ...],
    factors: gate.Held,
    held: tuple,
    basis: str,
    first: jax.Array,
) -> tuple:
    """New bases, squares in the order of their columns, and how many failed; one batched call after
    another.
    """
    bases, nu, failed = held
    out: gate.Held = {}
    squares = dict(nu)
    previous: PyTree = ()
    for group in groups:
        name = group.name
        out[name] = {}
        for axis, q in bases[name].items():
            ready = after(factors[name][axis], previous)
            if basis == "eigh":
                new, order = _eigenvectors(ready, q)
            else:
                # a first basis from scratch, later ones by a step of power iteration
                new, order = jax.lax.cond(first, _eigenvectors, _power_step, ready, q)
            previous = new
            good = jax.vmap(all_finite)(new)
            out[name][axis] = select(good, new, q)
            moved = _in_order(squares[name], int(axis), order)
            squares[name] = select(good, moved, squares[name])
            failed = failed + jnp.sum(~good, dtype=jnp.int32)
    return out, squares, failed


def _eigenvectors(matrices: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvectors, the largest value first; squares stay with the rank of the value."""
    # psd_eigh gives values in ascending order
    vectors = jax.vmap(psd_eigh)(matrices).vectors[..., ::-1]
    order = jnp.broadcast_to(jnp.arange(q.shape[-1]), q.shape[:-1])
    return vectors, varying_as(order, matrices)


def _power_step(matrices: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One orthogonalised product with columns in descending order of their Rayleigh quotients."""
    with jax.default_matmul_precision("highest"):
        products = matrices @ q
        # q_j^T H q_j
        values = jnp.sum(q * products, axis=1)
        order = jnp.argsort(-values, axis=-1)
        sorted_products = jnp.take_along_axis(products, order[:, None, :], axis=2)
        vectors, _ = lapack.qr(sorted_products)
    # positions have no part in what JAX knows of devices
    return vectors, varying_as(order, matrices)


def _in_order(tensors: jax.Array, axis: int, order: jax.Array) -> jax.Array:
    # axis 0 is that of copies
    along = axis + 1
    shape = [1] * tensors.ndim
    shape[0], shape[along] = order.shape
    # [copies, 1, ..., n, ..., 1]
    places = order.reshape(shape)
    return jnp.take_along_axis(tensors, places, axis=along)
