"""How the state of an optimizer is laid out over devices, beside its parameters."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kfac_optax._types import PyTree
from kfac_optax.engine.division import Share
from kfac_optax.engine.placed import division_of
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
    Factors, counts and all else are on every device, except the inverses that a placement divides.
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
    # what is given, then that of the placement, then that of the first parameter on one
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

    # statistics of a parameter (momentum) have its shape; others, counts say, do not
    def beside(leaf: Any, param: Any) -> Any:
        if isinstance(leaf, optax.MaskedNode):
            return leaf
        sharding = getattr(param, "sharding", None)
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
    if placement is None or not placement.divided:
        return shardings
    # [W slots, ...]: axis 0 of every inverse, the devices in their order
    divided = NamedSharding(known, P(placement.axis))

    def with_inverses(node: Any) -> Any:
        if not isinstance(node, CurvatureState):
            return node
        return node._replace(inverses=jax.tree.map(lambda _: divided, node.inverses))

    return jax.tree.map(
        with_inverses, shardings, is_leaf=lambda node: isinstance(node, CurvatureState)
    )


def whole_state(opt_state: PyTree, placement: Placement) -> PyTree:
    """A state as it would be without a placement, from one that a placement has divided.

    For `inverse_product`, posteriors and checkpoints that outlive the number of devices. Outside of
    `shard_map`.

    Args:
      opt_state: any Optax state.
      placement: that of the preconditioners in it.

    Returns:
      The state, its inverses `[copies, ...]` by bucket.

    Raises:
      ValueError: the state is not divided as the placement says.

    >>> import jax.numpy as jnp, kfac_optax as ko
    >>> estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> layers = estimator.layers(jnp.zeros((2, 1)), jnp.ones((4, 2)))
    >>> placement = Placement("data", 0.0, jax.sharding.AbstractMesh((4,), ("data",)))
    >>> tx = ko.kfac(layers, learning_rate=0.1, placement=placement)
    >>> state = tx.init(jnp.zeros((2, 1)))
    >>> for one in (state, whole_state(state, placement)):
    ...     print(one.preconditioner.inverses["dense_2x1"].inputs.values.shape)
    (4, 2)
    (1, 2)
    """

    def rows(share: Share) -> np.ndarray:
        # the first device of every group has what the group keeps
        workers = share.count.shape[1]
        pairs = enumerate(share.kept)
        return np.concatenate([g * workers * share.slots + np.arange(n) for g, n in pairs])

    def places(share: Share) -> int:
        return share.count.size * share.slots  # on all devices, empty ones among them

    return _rearranged("whole_state", opt_state, placement, rows, places)


def divided_state(opt_state: PyTree, placement: Placement) -> PyTree:
    """The inverse of `whole_state`: places a state over devices as a placement says.

    A checkpoint goes from one number of devices to another by both.

    Args:
      opt_state: any Optax state, of preconditioners without a placement.
      placement: that of the preconditioners to come.

    Returns:
      The state, its inverses `[W slots, ...]` by bucket, those of one device behind another's.

    Raises:
      ValueError: the state is divided already.

    >>> import jax.numpy as jnp, kfac_optax as ko
    >>> estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> w = jnp.zeros((2, 1))
    >>> state = ko.kfac(estimator.layers(w, jnp.ones((4, 2))), learning_rate=0.1).init(w)
    >>> placement = Placement("data", 0.0, jax.sharding.AbstractMesh((4,), ("data",)))
    >>> divided = divided_state(state, placement)
    >>> print(divided.preconditioner.inverses["dense_2x1"].inputs.values.shape)
    (4, 2)
    """

    def rows(share: Share) -> np.ndarray:
        # [groups, slots] -> [groups, m, slots]: every device of a group keeps the same
        kept = share.first[:, None] + np.arange(share.slots)
        # empty places repeat the last matrix
        kept = np.minimum(kept, share.copies - 1)
        return np.repeat(kept, share.count.shape[1], 0).ravel()

    return _rearranged("divided_state", opt_state, placement, rows, lambda share: share.copies)


def _rearranged(
    where: str,
    opt_state: PyTree,
    placement: Placement,
    rows: Callable[[Share], np.ndarray],
    places: Callable[[Share], int],
) -> PyTree:
    """A state with other rows of its inverses, of every bucket those that its share says, out of
    as many as there have to be.

    Raises:
      ValueError: there are more or fewer.
    """

    def change(node: Any) -> Any:
        if not isinstance(node, CurvatureState) or not placement.divided:
            return node
        shares, inverses = division_of(placement, node.factors).shares, {}
        for name, inverse in node.inverses.items():
            share = shares[name]
            # an index beyond the last row would silently mean the last row
            _check_places(where, name, inverse, places(share))
            taken = rows(share)
            inverses[name] = jax.tree.map(lambda x, taken=taken: x[taken], inverse)
        return node._replace(inverses=inverses)

    return jax.tree.map(change, opt_state, is_leaf=lambda node: isinstance(node, CurvatureState))


def _check_places(where: str, name: str, inverse: PyTree, expected: int) -> None:
    """Raises where a bucket does not have as many inverses as it has to."""
    for x in jax.tree.leaves(inverse):
        if x.shape[0] != expected:
            raise ValueError(
                f"{where}: the state holds {x.shape[0]} inverses of {name}; expected {expected}. "
                "whole_state takes a state that this very placement has divided, divided_state one "
                "that none has."
            )
