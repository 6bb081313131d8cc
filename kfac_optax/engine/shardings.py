"""How the state of an optimizer is laid out over devices, beside its parameters."""

from typing import Any

import jax
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kfac_optax._types import PyTree
from kfac_optax.engine.placement import Placement
from kfac_optax.engine.state import CurvatureState


def state_shardings(
    tx: optax.GradientTransformation,
    params: PyTree,
    *,
    mesh: Any = None,
    placement: Placement | None = None,
) -> PyTree:
    """Shardings of the state of `tx` that fit those of the parameters.

    What the state has of the shape of a parameter (momentum, say) is laid out as the parameter is.
    Factors, counts and all else are on every device, except what a placement divides: inverses,
    and factors where its statistics are not averaged.
    Give them to the compiled functions that make and that change the state, so that it stays where
    it is:

        shardings = ko.state_shardings(tx, params)
        opt_state = jax.jit(tx.init, out_shardings=shardings)(params)

    Inside `shard_map` the specs of these are those of the state,
    `jax.tree.map(lambda s: s.spec, shardings)`.

    Args:
      tx: any optimizer, chained or wrapped.
      params: arrays on their devices, or `jax.ShapeDtypeStruct`s with a sharding.
      mesh: of what is on all devices; by default that of the parameters or of the placement.
      placement: that of the preconditioner in `tx`, if it has one.

    Returns:
      A tree like the state, of `NamedSharding`s.

    Raises:
      ValueError: no mesh is known.

    >>> import jax.numpy as jnp
    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> w = jax.device_put(jnp.zeros((2, 1)), NamedSharding(mesh, P("data")))
    >>> trace, _ = state_shardings(optax.sgd(0.1, momentum=0.9), {"w": w})
    >>> print(tuple(trace.trace["w"].spec))
    ('data',)
    """
    # of the arguments the mesh, or else that of the parameters
    known = placement.mesh if mesh is None and placement is not None else mesh
    of_params = jax.tree.map(lambda x: getattr(x, "sharding", None), params)
    if known is None:
        meshes = [s.mesh for s in jax.tree.leaves(of_params) if isinstance(s, NamedSharding)]
        if not meshes:
            raise ValueError(
                "state_shardings: got parameters without a NamedSharding, and mesh=None; expected "
                "parameters on a mesh, jax.device_put(params, NamedSharding(mesh, P())), or mesh=."
            )
        known = meshes[0]
    everywhere = NamedSharding(known, P())

    def beside(leaf: Any, param: Any) -> Any:
        if isinstance(leaf, optax.MaskedNode):
            return leaf
        sharding = getattr(param, "sharding", None)
        # moments like the parameter; scalars and factors everywhere
        same = leaf.shape == param.shape and isinstance(sharding, NamedSharding)
        return sharding if same else everywhere

    state = jax.eval_shape(tx.init, params)
    shardings = optax.tree.map_params(
        tx.init,
        beside,
        state,
        params,
        transform_non_params=lambda tree: jax.tree.map(lambda _: everywhere, tree),
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )
    if placement is None or not (placement.divided or placement.owned):
        return shardings
    # [W places, ...], those of every device
    divided = NamedSharding(known, P(placement.axis))

    def over_devices(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda _: divided, tree)

    def with_places(node: Any) -> Any:
        if not isinstance(node, CurvatureState):
            return node
        if placement.divided:
            node = node._replace(inverses=over_devices(node.inverses))
        if placement.owned:
            own = {name: x._replace(own=over_devices(x.own)) for name, x in node.factors.items()}
            node = node._replace(factors=own)
        return node

    return jax.tree.map(
        with_places, shardings, is_leaf=lambda node: isinstance(node, CurvatureState)
    )
