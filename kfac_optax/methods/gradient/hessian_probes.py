"""Products of the Hessian with random vectors, once in a while."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from kfac_optax._tree import path_name, select
from kfac_optax._types import PyTree
from kfac_optax.engine.branches import due_at
from kfac_optax.linalg.gram import replicated
from kfac_optax.methods.gradient.treewise import Step, finite_as_one

Draw = Callable[..., jax.Array]  # (key, shape, dtype) -> entries of a probe
# (name, probe, product of the Hessian with it) -> squares of a leaf
Square = Callable[[str, jax.Array, jax.Array], jax.Array]


class Probes(NamedTuple):
    """Squares of what the probes gave, and how many of them there were."""

    squares: PyTree  # like the parameters
    count: jax.Array  # shape=(), dtype=int32
    key: jax.Array  # raw bits: checkpoints keep them as any array


def no_probes(squares: PyTree, seed: int) -> Probes:
    """Before the first probe."""
    return Probes(squares, jnp.zeros((), jnp.int32), jax.random.key_data(jax.random.key(seed)))


def hessian_product(
    where: str,
    params: PyTree,
    vector: PyTree,
    extra: dict[str, Any],
) -> PyTree:
    """`H v` by the extra argument `hvp`, or of `value_fn` by a derivative of its gradient.

    Raises:
      ValueError: neither was given; `value_fn` without all parameters.
    """
    if extra.get("hvp") is not None:
        return extra["hvp"](vector)
    value_fn = extra.get("value_fn", extra.get("obj_fn"))
    if value_fn is None:
        raise ValueError(
            f"{where}.update got neither `value_fn` nor `hvp`. Pass the loss of this batch as a "
            "function of the parameters,\n\n"
            "    tx.update(grads, opt_state, params, value_fn=lambda p: loss(p, batch))\n\n"
            "or a function that multiplies with its Hessian, hvp=lambda v: ..."
        )
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    if not leaves or any(isinstance(x, optax.MaskedNode) for x in leaves):
        raise ValueError(
            f"{where}.update: `value_fn` needs all parameters, but got "
            f"{'none' if not leaves else 'those that optax.masked left'}. Pass `params` to the "
            "update, or under optax.masked and optax.partition `hvp`, which takes the vector of "
            "this part."
        )
    return jax.jvp(jax.grad(value_fn), (params,), (vector,))[1]


class Taken(NamedTuple):
    """What became of a probe."""

    used: jax.Array
    skipped: jax.Array  # it was due, and not finite
    key: jax.Array


def probed(
    where: str,
    given: Step,
    probes: Probes,
    draw: Draw,
    square: Square,
) -> tuple[PyTree, Taken]:
    """Squares from a probe where one is due (`curvature_every`), and whether they are to be used.

    Args:
      where: for errors.
      given: of the step.
      probes: so far.
      draw: `(key, shape, dtype) -> entries` of a leaf of the probe.
      square: `(name, probe, H probe) -> squares` of a leaf, in the dtype of the state.
    """
    # a first probe that was not finite is made up for at once
    due = due_at(given.count, given.now["curvature_every"]) | (probes.count == 0)
    due = due & given.finite
    key, own = jax.random.split(jax.random.wrap_key_data(probes.key))
    like = given.gradient if given.params is None else given.params

    def measure() -> PyTree:
        # one draw for all leaves: many take long to compile
        wide = jax.tree.leaves(given.gradient)[0].dtype
        flat, back = ravel_pytree(jax.tree.map(lambda x: jnp.zeros(x.shape, wide), like))
        probe = jax.tree.map(_placed_as, back(draw(own, flat.shape, wide)), like)
        product = hessian_product(where, given.params, probe, given.extra)
        return jax.tree_util.tree_map_with_path(
            lambda path, v, hv: square(path_name(path), v.astype(wide), hv.astype(wide)),
            probe,
            product,
        )

    def nothing() -> PyTree:
        return jax.tree.map(jnp.zeros_like, given.gradient)

    squares = jax.lax.cond(due, measure, nothing)
    used = jax.lax.optimization_barrier(due & finite_as_one(squares))
    return squares, Taken(used, due & ~used, jax.random.key_data(key))


def _placed_as(v: jax.Array, like: jax.Array) -> jax.Array:
    """Entries of a probe with the dtype, and on explicit mesh axes the sharding, of a parameter."""
    v = v.astype(like.dtype)
    return v if replicated(like) is None else jax.sharding.reshard(v, jax.typeof(like).sharding)


def next_probes(old: Probes, squares: PyTree, taken: Taken) -> Probes:
    """With these squares in place of the old, where the probe is used."""
    kept = select(taken.used, squares, old.squares)
    return Probes(kept, old.count + taken.used.astype(jnp.int32), taken.key)
