"""Eva and Eva-f: curvature of rank one for every layer, in memory linear in its width."""

from typing import Any

import jax
import optax

from kfac_optax._types import Layers, ScalarOrSchedule
from kfac_optax._validate import check_choice, check_number
from kfac_optax.blocks.rank_one.rank_one import rank_one
from kfac_optax.engine.choice import cover, leave_out
from kfac_optax.engine.core import scale_by_curvature
from kfac_optax.engine.uncovered import WITHOUT_DIAGONAL
from kfac_optax.methods.record import Method, Sizes
from kfac_optax.methods.signature import flat_signature
from kfac_optax.step_rules.kl_clip import clip_by_kl

# a scale has no input side, a tied table two of them
LEFT_OUT = ("scale_shift", "tied_embedding", "masked")


def _preset(
    where: str,
    layers: Layers,
    *,
    learning_rate: ScalarOrSchedule | None = None,
    damping: ScalarOrSchedule = 0.03,
    kl_clip: ScalarOrSchedule | None = 1e-3,
    decay: ScalarOrSchedule = 0.05,
    curvature_every: ScalarOrSchedule = 1,
    uncovered: str = "graft",
    sharing: str = "expand",
    axis_name: Any = None,
    factor_dtype: Any = None,
    precision: jax.lax.PrecisionLike = "highest",
) -> optax.GradientTransformationExtraArgs:
    if learning_rate is None and kl_clip is not None:
        # nu depends on the rate
        raise ValueError(
            f"{where}: got kl_clip without learning_rate; KL-clip bounds the step that will be "
            "taken. Pass learning_rate=, the rate of the optimizer that follows, or kl_clip=None."
        )
    check_choice(where, "uncovered", uncovered, WITHOUT_DIAGONAL)
    # (c c^T + damping I)^{-1} V = (V - c <c, V> / (damping + |c|^2)) / damping
    check_number(where, "damping", damping, above=0, schedule=True)
    layers = cover(layers, where=where)
    # left out first, so that `uncovered` decides on what is left over
    layers = leave_out(layers, LEFT_OUT, "{kind}: no block of rank one")
    layers = cover(layers, uncovered=uncovered, where=where)
    # c = vec(a b^T) of Eva, a alone of Eva-f
    outputs = where == "eva"
    block = rank_one(outputs, sharing=sharing, precision=precision)
    preconditioner = scale_by_curvature(
        layers,
        block=lambda layer: block,
        damping=damping,
        decay=decay,
        curvature_every=curvature_every,
        inverse_every=1,  # nothing is factorised
        axis_name=axis_name,
        factor_dtype=factor_dtype,
    )
    return clip_by_kl(preconditioner, learning_rate=learning_rate, kl_clip=kl_clip, layers=layers)


@flat_signature(_preset)
def eva(layers: Layers, **options: Any) -> optax.GradientTransformationExtraArgs:
    """Eva: `U_i = (c_i c_i^T + damping I)^{-1} V_i` with `c = vec(a b^T)` of the mean input `a` and
    the mean output gradient `b` of each layer, then KL-clip.

    In closed form, `U = [V - a (a^T V b) b^T / (damping + |a|^2 |b|^2)] / damping`; the state is
    two vectors for every layer. The output gradients have to be those of the data's own losses:
    pass `curvature=empirical_fisher(per_example_loss).at(params, *args)`, or what
    `value_and_grad` of any estimator hands out next to the gradient, which takes no pass of its
    own and knows the weights of a likelihood (masks), where `empirical_fisher` takes the mean of
    the inputs over padding too. Chain it with the optimizer that takes the step.

    Args:
      layers: from `empirical_fisher(...).layers(params, *args)`, or another estimator's.
      **options: some of the words below.

    Words:
      learning_rate: KL-clip's rate; the rate itself belongs to the transformation that follows. May
        be left out only together with `kl_clip=None`.
      damping: Tikhonov damping, positive; in units of the squared gradient of one example.
      kl_clip: bound on the squared Fisher norm of a step; `None` for none, see `clip_by_kl`.
      decay: bound of the averaging weight `min(1 - 1/k, decay)`, small: the paper gives new means
        the weight 0.95.
      curvature_every: period of the means.
      uncovered: parameters without a block, among them scales and shifts of normalisation layers
        and tables that are softmax heads too: `"graft"` (their gradient with the size of
        the others' updates), `"pass"` (as it is) or `"raise"`.
      sharing: `"expand"` (means over positions, the paper) or `"reduce"` (output gradients of an
        example added up), see `rank_one`.
      axis_name: mapped axis of `shard_map`/`pmap`, if any.
      factor_dtype: dtype of the state, default float32 or the parameters' if wider.
      precision: matmul precision of solves.

    Returns:
      A transformation; its state is made of arrays only.

    Raises:
      ValueError: a hyperparameter out of range, or KL-clip without a rate; at the first update, an
        estimator whose output gradients have mean zero.

    >>> import jax.numpy as jnp, kfac_optax as ko
    >>> loss = lambda w, x: ko.tap_dense(x @ w, x, w)[:, 0]
    >>> estimator, w, x = ko.empirical_fisher(loss), jnp.zeros((2, 1)), jnp.array([[1.0, 0.0]])
    >>> tx = eva(estimator.layers(w, x), damping=1.0, kl_clip=None)
    >>> updates, state = tx.update(jnp.ones((2, 1)), tx.init(w), w, curvature=estimator.at(w, x))
    >>> print(updates.ravel())
    [0.5 1. ]

    Reference: Zhang, Shi & Li, Eva: Practical Second-order Optimization with Kronecker-vectorized
      Approximation (2023).
    """
    return _preset("eva", layers, **options)


@flat_signature(_preset)
def eva_f(layers: Layers, **options: Any) -> optax.GradientTransformationExtraArgs:
    """Eva-f: `foof` with the mean input of each layer in place of its second moment,
    `U_i = (a_i a_i^T + damping I)^{-1} V_i`, then KL-clip.

    In closed form, `U = [V - a (a^T V) / (damping + |a|^2)] / damping`; the state is one vector for
    every layer. Any estimator serves, `forward_only` above all. Chain it with the optimizer that
    takes the step.

    Args:
      layers: from `forward_only(predict).layers(params, *args)`, or another estimator's.
      **options: as for `eva`; the damping is in units of the squared input, and `sharing="reduce"`
        has the same mean, of convolutions without forming patches.

    Returns:
      A transformation; its state is made of arrays only.

    Raises:
      ValueError: a hyperparameter out of range, or KL-clip without a rate.

    >>> import jax.numpy as jnp, kfac_optax as ko
    >>> estimator = ko.forward_only(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> w, x = jnp.zeros((2, 1)), jnp.array([[1.0, 0.0]])
    >>> tx = eva_f(estimator.layers(w, x), damping=1.0, kl_clip=None)
    >>> updates, state = tx.update(jnp.ones((2, 1)), tx.init(w), w, curvature=estimator.at(w, x))
    >>> print(updates.ravel())
    [0.5 1. ]

    Reference: Zhang, Shi & Li, Eva: Practical Second-order Optimization with Kronecker-vectorized
      Approximation (2023).
    """
    return _preset("eva_f", layers, **options)


def _two_means(sizes: Sizes) -> int:
    # the means, and the same as they are used between refreshes
    return 2 * (sizes.p + sizes.q)


def _one_mean(sizes: Sizes) -> int:
    # the mean input, and the same between refreshes
    return 2 * sizes.p


# a rate for the bound, and a statistic in every other step
_SHORT: dict[str, Any] = dict(learning_rate=0.1, damping=0.05, curvature_every=2)

RECORDS = (
    Method(
        name="eva",
        kind="preconditioner",
        summary="curvature of rank one from mean input and mean output gradient, with "
        "`empirical_fisher` or any `value_and_grad`",
        paper="Zhang, Shi & Li (2023)",
        equation="U = (c cᵀ + λ I)⁻¹ V, c = vec(a bᵀ)",
        needs=frozenset({"gradient", "curvature", "losses"}),
        state=_two_means,
        state_text="2 (p + q)",
        cost=("O(d)", "O(d²)"),
        test="tests/blocks/test_rank_one.py::test_solve_is_the_dense_inverse",
        build=lambda layers, **options: eva(layers, **(_SHORT | options)),
        block_of=lambda layer: rank_one(),
    ),
    Method(
        name="eva_f",
        kind="preconditioner",
        summary="the same from the mean input alone, with any estimator",
        paper="Zhang, Shi & Li (2023)",
        equation="U = (a aᵀ + λ I)⁻¹ V",
        needs=frozenset({"gradient", "curvature"}),
        state=_one_mean,
        state_text="2 p",
        cost=("O(d)", "O(d²)"),
        test="tests/blocks/test_rank_one.py::test_solve_is_the_dense_inverse",
        build=lambda layers, **options: eva_f(layers, **(_SHORT | options)),
        block_of=lambda layer: rank_one(outputs=False),
    ),
)
