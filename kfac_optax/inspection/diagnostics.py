"""Looking into an optimizer state: scalars for logging and the coarse Fisher matrix for plotting."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kfac_optax._types import PyTree
from kfac_optax.blocks.low_rank.low_rank_side import LowRankInverse, Side, quality
from kfac_optax.couplings.coarse import Exact, Grams, coarse_matrix
from kfac_optax.engine.state import (
    CoarseState,
    CurvatureState,
    OwnFactors,
    find_states,
    the_state,
)
from kfac_optax.linalg import lapack
from kfac_optax.linalg.in_order import after
from kfac_optax.step_rules.balance import BalanceState
from kfac_optax.step_rules.bound import BoundState
from kfac_optax.step_rules.damping import DampingState
from kfac_optax.step_rules.kl_clip import KLClipState
from kfac_optax.step_rules.movement import MovementState
from kfac_optax.step_rules.quadratic_model import QuadraticState
from kfac_optax.step_rules.trust_region import TrustRegionState

_ROUNDING = 1e-10  # float32 squared: what a sum that should vanish leaves on the diagonal


class CoarseFisher(NamedTuple):
    """Coarse Fisher matrix scaled to unit diagonal, `[L, L]`, with the names of its rows."""

    matrix: np.ndarray
    names: tuple[str, ...]


def diagnostics(opt_state: PyTree) -> dict[str, jax.Array]:
    """Scalars that say how a K-FAC transformation is doing; works under `jit`.

    `kl_scale` and `trust_scale` (nu of KL-clip and of a trust region, if they are used),
    `step_rate`, `coarse_rate` and `bound_scale` of `bound_step`, `movement_scale` and
    `movement_norm` of `bound_movement`, `coarse_weight` of
    `balance_parts`, `damping`, `coarse_share` (norm of what the coupling changed over norm of the
    update), `inverse_age` (steps since the inverses were made; with `stagger`, the part made last),
    `statistics` (accepted), `skipped_statistics`, `failed_inverses`, the numbers of
    `quadratic_step` (`step_rate`, `step_momentum`, `model_change`, ...) and `adapt_damping`
    (`model_damping`, `reduction_ratio`, `rejected_steps`, ...) where they are used, and the range
    of the eigenvalues of all factors, `eigenvalue_min` and `eigenvalue_max` (computed on the spot;
    left out where no factor is a matrix, and where factors are divided over devices).
    Where factors are held as a few eigenpairs, also the worst over all of them: `captured_energy`
    (share of the trace in the pairs in use), `inversion_error` (an estimate of how much, relative
    to what is right, the inverse may be off along a direction that is left out; damping makes it
    small), and the largest `rank_in_use`.

    Args:
      opt_state: any Optax state with exactly one K-FAC transformation in it.

    Raises:
      ValueError: none, or several.

    >>> import jax.numpy as jnp, kfac_optax as ko
    >>> estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> tx = ko.kfac(estimator.layers(jnp.zeros((2, 1)), jnp.ones((4, 2))), learning_rate=0.1)
    >>> print(diagnostics(tx.init(jnp.zeros((2, 1))))["eigenvalue_max"])
    1.0
    """
    state = the_state(opt_state, CurvatureState, "diagnostics")
    return (
        _step_control(opt_state)
        | _low_rank(state.inverses)
        | _range(_spectra(state))
        | {
            "damping": state.damping,
            "coarse_share": state.coarse_share,
            "inverse_age": state.inverse_age,
            "statistics": state.curvature_count,
            "skipped_statistics": state.skipped_statistics,
            "failed_inverses": state.failed_inverses,
        }
    )


def _spectra(state: CurvatureState) -> list[jax.Array]:
    """Eigenvalues of the factors, of those with a few pairs what is held of them."""
    spectra: list[jax.Array] = []
    for name, factors in state.factors.items():
        # no device has those of all layers, and places without a layer hold something too
        if isinstance(factors, OwnFactors):
            continue
        # factors that are only followed have no matrix: the pairs that are held, and what stands
        # for the rest
        if isinstance(state.inverses[name], LowRankInverse):
            for side in state.inverses[name]:
                spectra.append(jnp.append(side.low.values, side.rest))
            continue
        for x in jax.tree.leaves(factors):
            # copies are on axis 0: as many vectors as they are long make no matrix
            if x.ndim >= 3 and x.shape[-1] == x.shape[-2]:
                values = lapack.eigvalsh(after(x, spectra))
                spectra.append(values.ravel())
    return spectra


def _range(spectra: list[jax.Array]) -> dict[str, jax.Array]:
    """Least and largest eigenvalue; empty where no factor is kept as a matrix."""
    # blocks without square factors have no spectrum to report
    if not spectra:
        return {}
    values = jnp.concatenate(spectra)
    return {"eigenvalue_min": values.min(), "eigenvalue_max": values.max()}


def _low_rank(inverse: dict[str, PyTree]) -> dict[str, jax.Array]:
    """How good the decompositions with a few pairs are, the worst of all factors; empty where there
    are none.
    """
    # [copies] of both sides of every bucket
    sides: list[Side] = []
    for held in inverse.values():
        if isinstance(held, LowRankInverse):
            sides += held
    if not sides:
        # of several states of one kind the outermost decides what is applied
        return {}
    qualities = [jax.vmap(quality)(side) for side in sides]
    return {
        "captured_energy": jnp.stack([q.energy.min() for q in qualities]).min(),
        "inversion_error": jnp.stack([q.error.max() for q in qualities]).max(),
        "rank_in_use": jnp.stack([q.used.max() for q in qualities]).max(),
    }


_NUMBERS: dict[type, tuple[str, ...]] = {
    KLClipState: ("kl_scale",),
    TrustRegionState: ("trust_scale",),
    BoundState: ("step_rate", "coarse_rate", "bound_scale"),
    MovementState: ("movement_scale", "movement_norm"),
    BalanceState: ("coarse_weight",),
    QuadraticState: (
        "step_rate",
        "step_momentum",
        "coarse_rate",
        "model_change",
        "damped_change",
        "non_finite_models",
        "negative_curvatures",
    ),
    DampingState: (
        "model_damping",
        "preconditioner_damping",
        "reduction_ratio",
        "rejected_steps",
        "rejected_in_a_row",
        "damping_at_bound",
    ),
}


def _step_control(opt_state: PyTree) -> dict[str, jax.Array]:
    """What decided the length of the step, from the outermost transformation of each kind."""
    numbers: dict[str, jax.Array] = {}
    for kind, names in _NUMBERS.items():
        for outermost in find_states(opt_state, kind)[:1]:
            numbers |= {name: getattr(outermost, name) for name in names}
    return numbers


def coarse_fisher(opt_state: PyTree) -> CoarseFisher:
    """The coarse Fisher matrix scaled to unit diagonal, `F_c[i, j] / sqrt(F_c[i, i] F_c[j, j])`,
    with layer names.

    Off-diagonal entries show how strongly layers are coupled, which block-diagonal K-FAC leaves
    out. Rows of layers that the coarse space does not see are zero: layers without gradient, and
    those whose gradients sum to zero by construction, such as a softmax head or what only a layer
    norm reads (diagonal below 1e-10 of the largest: rounding).

    Args:
      opt_state: an Optax state with exactly one two-level K-FAC transformation in it.

    Returns:
      `CoarseFisher(matrix, names)`, rows in order of execution.

    Raises:
      ValueError: no coarse correction in the state, or several.

    >>> import jax.numpy as jnp, kfac_optax as ko
    >>> estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> w, x = jnp.zeros((2, 1)), jnp.ones((4, 2))
    >>> tx = ko.kfac_two_level(estimator.layers(w, x), learning_rate=0.1)
    >>> _, state = tx.update(w, tx.init(w), w, curvature=estimator.at(w, x))
    >>> print(coarse_fisher(state).matrix)
    [[1.]]
    """
    coarse = the_state(opt_state, CoarseState, "coarse_fisher")
    # other couplings keep something else
    statistic = coarse.coarse_factors
    if not isinstance(statistic, Grams | Exact):
        raise ValueError(
            f"coarse_fisher: this coupling keeps {type(statistic).__name__}, no coarse matrix; "
            "expected the state of kfac_two_level, or of another preset with coarse_correction() "
            "or deflated()."
        )
    matrix = np.asarray(coarse_matrix(statistic))
    # rows of a stack or of groups are numbered
    names: dict[int, str] = {}
    for path, rows in coarse.coarse_index.items():
        rows = np.asarray(rows)
        for i, row in enumerate(rows):
            names[int(row)] = path if len(rows) == 1 else f"{path}[{i}]"
    # F_c[i, j] / sqrt(F_c[i, i] F_c[j, j]), zero for rows that are rounding
    diagonal = np.diagonal(matrix)
    rounding = _ROUNDING * diagonal.max(initial=0)
    root = np.sqrt(np.where(diagonal > rounding, diagonal, 0))
    scale = np.divide(1, root, out=np.zeros_like(root), where=root > 0)
    in_order = tuple(names[i] for i in range(len(names)))
    return CoarseFisher(matrix * scale[:, None] * scale, in_order)
