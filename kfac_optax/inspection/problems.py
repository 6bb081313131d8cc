"""What went wrong in a run, in sentences."""

import jax

from kfac_optax._types import PyTree
from kfac_optax._validate import Checked
from kfac_optax.engine.state import (
    CurvatureState,
    GNBState,
    GradientCounts,
    SampleSpaceState,
    find_states,
)
from kfac_optax.step_rules.damping import DampingState
from kfac_optax.step_rules.movement import MovementState
from kfac_optax.step_rules.quadratic_model import QuadraticState

_PROBLEMS: dict[type, dict[str, str]] = {
    # statistics and inverses of blocks: the last good ones are kept
    CurvatureState: {
        "skipped_statistics": "{} statistics were not finite and dropped: look for NaN or Inf in the batches or the model.",
        "failed_inverses": "{} factorisations failed and the last good inverses were kept: raise the damping.",
        "non_finite_updates": (
            "{} updates were not finite and became zero: look for NaN or Inf in gradients or "
            "parameters, and whether the loss is scaled by far too much."
        ),
    },
    # presets that see gradients alone
    GradientCounts: {
        "skipped_gradients": (
            "{} gradients were not finite and left out, with an update of zero: look for "
            "NaN or Inf in the batches or the model."
        ),
        "skipped_statistics": (
            "{} statistics of finite gradients were not finite and dropped: squares of the "
            "gradient overflow, so scale the loss down."
        ),
        "failed_inverses": (
            "{} roots or bases failed and the last good ones were kept: raise the ridge."
        ),
        "non_finite_updates": (
            "{} updates of finite gradients were not finite and became zero: look at the scale of "
            "the loss."
        ),
    },
    # a diagonal for another optimizer
    GNBState: {
        "skipped_estimates": (
            "{} estimates of the Hessian's diagonal were not finite and became zero: look for NaN "
            "or Inf in the batches or the model."
        ),
    },
    # solves in the space of samples
    SampleSpaceState: {
        "skipped_steps": (
            "{} steps were left out, with an update of zero: look for NaN or Inf in gradients, "
            "batches or the model, whether any example of the batch counts, and raise the damping "
            "or pass cutoff= where the kernel is singular."
        ),
        "inexact_solves": (
            "{} solves left more than a tenth of the gradient: a kernel of the rows of layers "
            "knows nothing of examples that interact (batch statistics, say), so leave layers= "
            "out; or the damping is below what the precision resolves, so raise it."
        ),
    },
    # steps from an exact quadratic model
    QuadraticState: {
        "non_finite_models": (
            "{} steps were left out because the quadratic model was not finite: look for NaN or "
            "Inf in gradients, batches or the model."
        ),
        "negative_curvatures": (
            "{} steps were left out because the quadratic model has negative curvature: a Fisher "
            "or GGN has none, so check hessian_product of the likelihood, and that predict and the "
            "loss belong together."
        ),
    },
    # a bound on the whole movement
    MovementState: {
        "other_movements": (
            "{} shortened steps moved the parameters otherwise than sgd(learning_rate, momentum) "
            "behind them would have, so the momentum was left out of the bound: pass the momentum= and "
            'learning_rate= of what follows, or bound="damped" where that is no sgd.'
        ),
    },
    # damping that adapts
    DampingState: {
        "rejected_steps": (
            "{} steps were rejected because the objective rose or was not finite: if this goes on, "
            "check that value_fn is deterministic and computes the same objective as value, on the "
            "batch of the gradient."
        ),
        "damping_at_bound": (
            "{} times the adapted damping ended on damping_min or damping_max, its bound: on the "
            "upper one the model never predicts the objective (check value_fn and the likelihood), "
            "on the lower one it always does."
        ),
    },
}


def problems(opt_state: PyTree) -> list[str]:
    """What went wrong so far, in sentences: what happened, how often, and what to do. Empty where
    nothing did.

    Looks at the whole state: statistics dropped, factorisations that failed, quadratic models
    without a minimum, steps rejected, a damping on its bound, hyperparameters that made no sense.
    Reads values, so it belongs outside of `jit`.

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
    # every state of a kind, wherever it is nested
    found = []
    for kind, texts in _PROBLEMS.items():
        for state in find_states(opt_state, kind):
            for field, text in texts.items():
                count = int(getattr(state, field))
                if count:
                    found.append(text.format(count))
    return found + _ignored(opt_state)


def _ignored(opt_state: PyTree) -> list[str]:
    """Hyperparameters whose values made no sense."""
    sentences: list[str] = []
    leaves, _ = jax.tree_util.tree_flatten_with_path(
        opt_state, is_leaf=lambda x: isinstance(x, Checked)
    )
    # hyperparameters stand in the state under their names
    for path, found in leaves:
        if isinstance(found, Checked) and int(found.ignored_values):
            # hyperparameters of the engine carry a prefix
            name = str(path[-1].key).removeprefix("given_")
            sentences.append(
                f"{int(found.ignored_values)} values of {name} made no sense (out of range, or not "
                "finite) and the last good one was used: look at its schedule, or what is injected."
            )
    return sentences
