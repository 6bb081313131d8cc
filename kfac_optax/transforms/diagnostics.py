"""Looking into an optimizer state: scalars for logging and the coarse Fisher matrix for plotting."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kfac_optax._types import PyTree
from kfac_optax.control.damping import DampingState
from kfac_optax.control.kl_clip import KLClipState
from kfac_optax.control.quadratic_model import QuadraticState
from kfac_optax.coupling.coarse import Exact, Grams, coarse_matrix
from kfac_optax.linalg.factorize import after
from kfac_optax.transforms.state import CoarseState, CurvatureState

_ROUNDING = 1e-10  # float32 squared: what a sum that should vanish leaves on the diagonal


class CoarseFisher(NamedTuple):
    """Coarse Fisher matrix scaled to unit diagonal, `[L, L]`, with the names of its rows."""

    matrix: np.ndarray
    names: tuple[str, ...]


def _find(opt_state: PyTree, kind: type) -> list[Any]:
    found: list[Any] = []

    def visit(node: Any) -> bool:
        if isinstance(node, kind):
            found.append(node)
        return False  # go on inside: a clip wraps the curvature's own state

    jax.tree.leaves(opt_state, is_leaf=visit)
    return found


def _the(opt_state: PyTree, kind: type, where: str) -> Any:
    found = _find(opt_state, kind)
    if len(found) != 1:
        raise ValueError(
            f"{where}: found {len(found)} {kind.__name__} in the optimizer state; expected exactly one. Pass the state of one "
            "K-FAC transformation (of one group, under optax.partition)."
        )
    return found[0]


def diagnostics(opt_state: PyTree) -> dict[str, jax.Array]:
    """Scalars that say how a K-FAC transformation is doing; works under `jit`.

    `kl_scale` (nu of KL-clip, if it is used), `damping`, `coarse_share` (norm of what the coupling
    changed over norm of the update),
    `inverse_age` (steps since the inverses were made; with `stagger`, the part made last), `statistics` (accepted),
    `skipped_statistics`, `failed_inverses`,
    the numbers of `quadratic_step` (`step_rate`, `step_momentum`, `model_change`, ...) and `adapt_damping`
    (`model_damping`, `reduction_ratio`, `rejected_steps`, ...) where they are used,
    and the range of the eigenvalues of all factors, `eigenvalue_min` and `eigenvalue_max` (computed on the spot).

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
    state = _the(opt_state, CurvatureState, "diagnostics")
    spectra: list[jax.Array] = []
    for x in jax.tree.leaves(state.factors):
        if x.ndim >= 2 and x.shape[-1] == x.shape[-2]:
            spectra.append(jnp.linalg.eigvalsh(after(x, spectra)).ravel())
    values = jnp.concatenate(spectra)
    clips = _find(opt_state, KLClipState)
    scale = {"kl_scale": clips[0].kl_scale} if clips else {}
    return (
        scale
        | _step_control(opt_state)
        | {
            "damping": state.damping,
            "coarse_share": state.coarse_share,
            "inverse_age": state.inverse_age,
            "statistics": state.curvature_count,
            "skipped_statistics": state.skipped_statistics,
            "failed_inverses": state.failed_inverses,
            "eigenvalue_min": values.min(),
            "eigenvalue_max": values.max(),
        }
    )


def _step_control(opt_state: PyTree) -> dict[str, jax.Array]:
    """Numbers of `quadratic_step` and `adapt_damping`, where they are used once."""
    found = {}
    for kind in (QuadraticState, DampingState):
        states = _find(opt_state, kind)
        if len(states) == 1:
            found |= {n: x for n, x in states[0]._asdict().items() if n not in _NOT_SCALARS}
    return found


_NOT_SCALARS = ("previous_update", "optimizer", "quadratic_count", "damping_count")


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
    coarse = _the(opt_state, CoarseState, "coarse_fisher")
    statistic = coarse.coarse_factors
    if not isinstance(statistic, Grams | Exact):
        raise ValueError(
            f"coarse_fisher: this coupling keeps {type(statistic).__name__}, no coarse matrix; expected the state of "
            "kfac_two_level, or of another preset with coarse_correction() or deflated()."
        )
    matrix = np.asarray(coarse_matrix(statistic))
    names: dict[int, str] = {}
    for path, rows in coarse.coarse_index.items():
        rows = np.asarray(rows)
        names |= {int(r): path if len(rows) == 1 else f"{path}[{i}]" for i, r in enumerate(rows)}
    diagonal = np.diagonal(matrix)
    root = np.sqrt(np.where(diagonal > _ROUNDING * diagonal.max(initial=0), diagonal, 0))
    scale = np.divide(1, root, out=np.zeros_like(root), where=root > 0)
    return CoarseFisher(matrix * scale[:, None] * scale, tuple(names[i] for i in range(len(names))))


def problems(opt_state: PyTree) -> list[str]:
    """What went wrong so far, in sentences: what happened, how often, and what to do. Empty where nothing did.

    Looks at the whole state: statistics dropped, factorisations that failed, quadratic models without a minimum, steps
    rejected, a damping on its bound. Reads values, so it belongs outside of `jit`.

    Args:
      opt_state: any Optax state.

    >>> import jax.numpy as jnp, kfac_optax as ko
    >>> estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> w, x = jnp.zeros((2, 1)), jnp.full((4, 2), jnp.nan)
    >>> tx = ko.kfac(estimator.layers(w, x), learning_rate=0.1)
    >>> _, state = tx.update(w, tx.init(w), w, curvature=estimator.at(w, x))
    >>> print(problems(state)[0][:56])
    1 statistics were not finite and dropped: look for NaN o
    """
    return [
        text.format(int(getattr(state, field)))
        for kind, texts in _PROBLEMS.items()
        for state in _find(opt_state, kind)
        for field, text in texts.items()
        if int(getattr(state, field))
    ]


_PROBLEMS: dict[type, dict[str, str]] = {
    CurvatureState: {
        "skipped_statistics": "{} statistics were not finite and dropped: look for NaN or Inf in the batches or the model.",
        "failed_inverses": "{} factorisations failed and the last good inverses were kept: raise the damping.",
    },
    QuadraticState: {
        "non_finite_models": (
            "{} steps were left out because the quadratic model was not finite: look for NaN or Inf in gradients, batches or "
            "the model."
        ),
        "negative_curvatures": (
            "{} steps were left out because the quadratic model has negative curvature: a Fisher or GGN has none, so check "
            "hessian_product of the likelihood, and that predict and the loss belong together."
        ),
    },
    DampingState: {
        "rejected_steps": (
            "{} steps were rejected because the objective rose or was not finite: if this goes on, check that value_fn is "
            "deterministic and computes the same objective as value, on the batch of the gradient."
        ),
        "damping_at_bound": (
            "{} times the adapted damping ended on damping_min or damping_max, its bound: on the upper one the model never "
            "predicts the objective (check value_fn and the likelihood), on the lower one it always does."
        ),
    },
}
