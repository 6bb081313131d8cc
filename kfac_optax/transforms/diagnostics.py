"""Looking into an optimizer state: scalars for logging and the coarse Fisher matrix for plotting."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kfac_optax._types import PyTree
from kfac_optax.control.kl_clip import KLClipState
from kfac_optax.control.trust_region import TrustRegionState
from kfac_optax.coupling.coarse import Grams
from kfac_optax.linalg.factorize import after
from kfac_optax.transforms.state import CoarseState, CurvatureState, find_states, the_state

_ROUNDING = 1e-10  # float32 squared: what a sum that should vanish leaves on the diagonal


class CoarseFisher(NamedTuple):
    """Coarse Fisher matrix scaled to unit diagonal, `[L, L]`, with the names of its rows."""

    matrix: np.ndarray
    names: tuple[str, ...]


def diagnostics(opt_state: PyTree) -> dict[str, jax.Array]:
    """Scalars that say how a K-FAC transformation is doing; works under `jit`.

    `kl_scale` and `trust_scale` (nu of KL-clip and of a trust region, if they are used), `damping`, `coarse_share` (norm of
    the coarse part over norm of the update), `inverse_age` (steps since the inverses were made), `statistics` (accepted),
    `skipped_statistics`, `failed_inverses`, and the range of the eigenvalues of all factors, `eigenvalue_min` and
    `eigenvalue_max` (computed on the spot).

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
    spectra: list[jax.Array] = []
    for x in jax.tree.leaves(state.factors):
        if x.ndim >= 2 and x.shape[-1] == x.shape[-2]:
            spectra.append(jnp.linalg.eigvalsh(after(x, spectra)).ravel())
    values = jnp.concatenate(spectra)
    scale = {}
    for clip in find_states(opt_state, KLClipState)[:1]:
        scale["kl_scale"] = clip.kl_scale
    for clip in find_states(opt_state, TrustRegionState)[:1]:
        scale["trust_scale"] = clip.trust_scale
    return scale | {
        "damping": state.damping,
        "coarse_share": state.coarse_share,
        "inverse_age": state.inverse_age,
        "statistics": state.curvature_count,
        "skipped_statistics": state.skipped_statistics,
        "failed_inverses": state.failed_inverses,
        "eigenvalue_min": values.min(),
        "eigenvalue_max": values.max(),
    }


def coarse_fisher(opt_state: PyTree) -> CoarseFisher:
    """The coarse Fisher matrix scaled to unit diagonal, `F_c[i, j] / sqrt(F_c[i, i] F_c[j, j])`, with layer names.

    Off-diagonal entries show how strongly layers are coupled, which block-diagonal K-FAC leaves out. Rows of layers that
    the coarse space does not see are zero: layers without gradient, and those whose gradients sum to zero by construction,
    such as a softmax head or what only a layer norm reads (diagonal below 1e-10 of the largest: rounding).

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
    statistic = coarse.coarse_factors
    matrix = np.asarray(statistic.inputs * statistic.outputs if isinstance(statistic, Grams) else statistic.fisher)
    names: dict[int, str] = {}
    for path, rows in coarse.coarse_index.items():
        rows = np.asarray(rows)
        names |= {int(r): path if len(rows) == 1 else f"{path}[{i}]" for i, r in enumerate(rows)}
    diagonal = np.diagonal(matrix)
    root = np.sqrt(np.where(diagonal > _ROUNDING * diagonal.max(initial=0), diagonal, 0))
    scale = np.divide(1, root, out=np.zeros_like(root), where=root > 0)
    return CoarseFisher(matrix * scale[:, None] * scale, tuple(names[i] for i in range(len(names))))
