"""A state that a placement divides, from one that is whole, and back."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kfac_optax._types import PyTree
from kfac_optax.engine.division import Share
from kfac_optax.engine.placed import division_of
from kfac_optax.engine.placement import Placement
from kfac_optax.engine.state import CurvatureState, OwnFactors, own_values


def whole_state(opt_state: PyTree, placement: Placement) -> PyTree:
    """A state as it would be without a placement, from one that a placement has divided.

    For `inverse_product`, posteriors and checkpoints that outlive the number of devices. Outside of
    `shard_map`.

    Args:
      opt_state: any Optax state, of arrays with values.
      placement: that of the preconditioners in it.

    Returns:
      The state, its inverses `[copies, ...]` by bucket, and its factors where statistics are not averaged.

    Raises:
      ValueError: the state is not divided as the placement says.

    >>> import jax.numpy as jnp, kfac_optax as ko
    >>> estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> layers = estimator.layers(jnp.zeros((2, 1)), jnp.ones((4, 2)))
    >>> placement = Placement("data", 0.0, jax.sharding.AbstractMesh((4,), ("data",)))
    >>> tx = ko.kfac(layers, kl_clip=None, placement=placement)
    >>> state = tx.init(jnp.zeros((2, 1)))
    >>> for one in (state, whole_state(state, placement)):
    ...     print(one.preconditioner.inverses["dense_2x1"].inputs.values.shape)
    (4, 2)
    (1, 2)
    """
    where = "whole_state"

    def whole(state: CurvatureState) -> CurvatureState:
        factors = state.factors
        copies = _copies(where, factors, placement.owned)
        shares = division_of(placement, copies, factors).shares
        if placement.owned:
            _check_counts(where, factors, shares)
            own = {name: own_values(x) for name, x in factors.items()}
            factors = _moved(where, "factors", own, shares, _FROM_DEVICES)
        inverses = state.inverses
        if placement.divided:
            inverses = _moved(where, "inverses", inverses, shares, _FROM_GROUPS)
        return state._replace(inverses=inverses, factors=factors)

    return _each(opt_state, whole)


def divided_state(opt_state: PyTree, placement: Placement) -> PyTree:
    """The inverse of `whole_state`: places a state over devices as a placement says.

    A checkpoint goes from one number of devices to another by both.

    Args:
      opt_state: any Optax state, of preconditioners without a placement.
      placement: that of the preconditioners to come.

    Returns:
      The state, its inverses `[W slots, ...]` by bucket, those of one device behind another's, and
      so its factors where statistics are not averaged.

    Raises:
      ValueError: the state is divided already.

    >>> import jax.numpy as jnp, kfac_optax as ko
    >>> estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> w = jnp.zeros((2, 1))
    >>> state = ko.kfac(estimator.layers(w, jnp.ones((4, 2))), kl_clip=None).init(w)
    >>> placement = Placement("data", 0.0, jax.sharding.AbstractMesh((4,), ("data",)))
    >>> divided = divided_state(state, placement)
    >>> print(divided.preconditioner.inverses["dense_2x1"].inputs.values.shape)
    (4, 2)
    """
    where = "divided_state"

    def divided(state: CurvatureState) -> CurvatureState:
        factors, inverses = state.factors, state.inverses
        shares = division_of(placement, _copies(where, factors, False), factors).shares
        if placement.divided:
            inverses = _moved(where, "inverses", inverses, shares, _TO_GROUPS)
        if placement.owned:
            own = _moved(where, "factors", factors, shares, _TO_DEVICES)
            counts = {name: jnp.asarray(share.count, jnp.int32) for name, share in shares.items()}
            factors = {name: OwnFactors(x, counts[name]) for name, x in own.items()}
        return state._replace(inverses=inverses, factors=factors)

    return _each(opt_state, divided)


class _Move(NamedTuple):
    """Rows of the old order for the places of the new one, and how many there have to be."""

    rows: Callable[[Share], np.ndarray]
    places: Callable[[Share], int]


def _of_groups(share: Share) -> np.ndarray:
    # the first device of every group has what the group keeps
    workers = share.count.shape[1]
    pairs = enumerate(share.kept)
    return np.concatenate([g * workers * share.slots + np.arange(n) for g, n in pairs])


def _of_devices(share: Share) -> np.ndarray:
    pairs = enumerate(share.count.ravel())
    return np.concatenate([d * share.most + np.arange(n) for d, n in pairs])


def _to_groups(share: Share) -> np.ndarray:
    kept = share.first[:, None] + np.arange(share.slots)
    # empty places repeat the last matrix
    return np.repeat(np.minimum(kept, share.copies - 1), share.count.shape[1], 0).ravel()


def _to_devices(share: Share) -> np.ndarray:
    made = share.start.ravel()[:, None] + np.arange(share.most)
    return np.minimum(made, share.copies - 1).ravel()


# places on all devices, empty ones among them; or one for each copy
_FROM_GROUPS = _Move(_of_groups, lambda share: share.count.size * share.slots)
_FROM_DEVICES = _Move(_of_devices, lambda share: share.count.size * share.most)
_TO_GROUPS = _Move(_to_groups, lambda share: share.copies)
_TO_DEVICES = _Move(_to_devices, lambda share: share.copies)


def _moved(
    where: str, what: str, trees: Mapping[str, PyTree], shares: Mapping[str, Share], move: _Move
) -> dict[str, PyTree]:
    """Arrays by bucket with other rows, of every bucket those that its share says.

    Raises:
      ValueError: there are more or fewer than there have to be.
    """
    moved = {}
    for name, tree in trees.items():
        share = shares[name]
        # an index beyond the last row would silently mean the last row
        _check_places(where, what, name, tree, move.places(share))
        rows = move.rows(share)
        moved[name] = jax.tree.map(lambda x, rows=rows: x[rows], tree)
    return moved


def _copies(where: str, factors: Mapping[str, PyTree], owned: bool) -> dict[str, int]:
    """How many matrices every bucket of a state has.

    Raises:
      ValueError: its factors are divided over devices and should not be, or the other way round.
    """
    copies = {}
    for name, statistic in factors.items():
        divided = isinstance(statistic, OwnFactors)
        if divided != owned:
            got, expected = ("divided", "whole") if divided else ("whole", "divided")
            raise ValueError(
                f"{where}: the factors of {name} are {got}; expected them {expected}. whole_state "
                "takes the placement that has divided the state, divided_state a state that none has."
            )
        # of those that are divided the places may be empty: the table counts
        first = jax.tree.leaves(statistic)[0]
        copies[name] = int(np.sum(statistic.counts)) if divided else first.shape[0]
    return copies


def _check_counts(where: str, factors: Mapping[str, Any], shares: Mapping[str, Share]) -> None:
    """Raises where other devices have the factors than a placement says."""
    for name, statistic in factors.items():
        got, expected = np.asarray(statistic.counts).tolist(), shares[name].count.tolist()
        if got != expected:
            raise ValueError(
                f"{where}: the devices have {got} factors of {name}; expected {expected}, groups in "
                "rows. Pass the placement that the state was made with."
            )


def _each(opt_state: PyTree, change: Callable[[CurvatureState], CurvatureState]) -> PyTree:
    """An optimizer state with all of its preconditioners' states changed."""

    def of_node(node: Any) -> Any:
        return change(node) if isinstance(node, CurvatureState) else node

    return jax.tree.map(of_node, opt_state, is_leaf=lambda node: isinstance(node, CurvatureState))


def _check_places(where: str, what: str, name: str, tree: PyTree, expected: int) -> None:
    """Raises where a bucket does not have as many rows as it has to."""
    for x in jax.tree.leaves(tree):
        if x.shape[0] != expected:
            raise ValueError(
                f"{where}: the state holds {x.shape[0]} {what} of {name}; expected {expected}. "
                "whole_state takes a state that this very placement has divided, divided_state one "
                "that none has."
            )
