"""K-FAC as a preconditioner; chain it with `optax.sgd` or any other optimizer."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kfac_optax._types import Block, Coupling, Layer, Layers, ScalarOrSchedule
from kfac_optax._validate import check_choice, check_momentum, check_unused
from kfac_optax.blocks.kronecker.kronecker import kronecker
from kfac_optax.engine.choice import BlockOf, blocks_of, cover, kronecker_by
from kfac_optax.engine.core import scale_by_curvature
from kfac_optax.engine.placement import Placement
from kfac_optax.engine.schedule import INVERSE_EVERY
from kfac_optax.methods.given import with_checked
from kfac_optax.methods.record import SHORT_CLIPPED, Method, Sizes
from kfac_optax.methods.signature import flat_signature
from kfac_optax.step_rules.balance import balance_parts
from kfac_optax.step_rules.bound import bound_step
from kfac_optax.step_rules.kl_clip import clip_by_kl
from kfac_optax.step_rules.movement import bound_movement

# by the network; in the metric of the batch, in that of the blocks, or first in one, then in the other
BOUNDS = ("auto", "exact", "damped", "movement")
# of fine and coarse part: by a model, added up, or handed on
BALANCES = ("model", "sum", "apart")


@flat_signature()
def kfac(
    layers: Layers,
    *,
    learning_rate: ScalarOrSchedule | None = None,
    damping: ScalarOrSchedule = 1e-3,
    kl_clip: ScalarOrSchedule | None = 1e-3,
    bound: str = "auto",
    momentum: float = 0.9,
    decay: ScalarOrSchedule = 0.95,
    curvature_every: ScalarOrSchedule = 10,
    inverse_every: ScalarOrSchedule = INVERSE_EVERY,
    stagger: int | None = None,
    inverse: str = "auto",
    uncovered: str = "graft",
    normalization: str = "unitwise",
    sharing: str = "expand",
    positions: int | None = None,
    convolution: str = "kfc",
    recurrence: str = "independent",
    axis_name: Any = None,
    factor_dtype: Any = None,
    precision: Any = "highest",
    block: Block | BlockOf | None = None,
    factored_gradient: bool = False,
    coupling: Coupling | None = None,
    balance: str = "sum",
    placement: Placement | None = None,
) -> optax.GradientTransformationExtraArgs:
    """K-FAC: block-diagonal natural gradient, `U_i = (A_i (x) G_i + damping I)^{-1} V_i`, then a
    bound on the step.

    Chain it with the optimizer that takes the step,
    `optax.chain(kfac(layers, learning_rate=lr), optax.sgd(lr, 0.9))`, and pass
    `curvature=fisher.at(params, *args, key=key)` to every update.

    Args:
      layers: from `fisher.layers(params, *args)`.
      learning_rate: KL-clip's rate; the rate itself belongs to the transformation that follows. May
        be left out only together with `kl_clip=None`, where what follows decides on the length of
        the step (`quadratic_step`); one that is given there is checked and not read.
      damping: Tikhonov damping.
      kl_clip: bound on the squared Fisher norm of a step; `None` hands on the preconditioned
        gradient as it is.
      bound: `"damped"` is KL-clip as in the papers, which scales the update down to
        `<U, V> <= kl_clip / learning_rate^2` (see `clip_by_kl`). `"movement"` is KL-clip, and
        behind it the same `kl_clip` as a bound on the whole step, momentum included, in the exact
        metric (see `bound_movement`): a rate that is too large is survived. `"auto"` is
        `"movement"`, but `"damped"` where most of the weights have a normalisation behind them
        (`layer.scale_free`), which bounds by itself what a step can do; a curvature without exact
        products leaves KL-clip alone, too. `"exact"` makes the step, momentum included, as long as
        an exact quadratic model wants it and bounds it in the metric of the Fisher itself (see
        `bound_step`): the level of the rate has no influence then.
      momentum: of the transformation that follows; all but `bound="damped"` count it.
      decay: bound of the averaging weight `min(1 - 1/k, decay)`.
      curvature_every: period of the statistics.
      inverse_every: period of the inverses; by default 10 in the first 100 steps, since the first
        ones know a single batch, and 100 after. `refresh_period(...)` makes such a schedule.
      stagger: spreads a refresh over this many steps of its period, see `scale_by_curvature`.
      inverse: `"eigh"` (exact damping), `"cholesky"` (factored Tikhonov damping, half the products
        in a step and a cheaper refresh), `"newton"` (the same, refreshed by matrix products from
        the last inverse; for accelerators); or `"auto"`: `"eigh"` for layers of at most 128 inputs
        and outputs, `"cholesky"` for wider ones. `coverage` shows which. Layers with a mask have
        `"cholesky"` alone (`"newton"` is the same for them), embeddings no `"newton"`.
      uncovered: parameters without a block: `"graft"` (their gradient with the size of the others'
        updates, and clipped with them), `"pass"` (their gradient as it is), `"diagonal"` (diagonal
        of the Fisher) or `"raise"`.
      normalization: scale and shift of normalisation layers: `"unitwise"` (a 2 x 2 block for every
        channel), `"diagonal"` or `"pass"`.
      sharing: positions that share a weight: `"expand"` (a row each, KFC) or `"reduce"` (pooled per
        example); look-ups and normalisation layers always have a row each.
      positions: at most about this many positions of an example are measured; `None` for all.
      convolution: `"kfc"` or, cheaper for wide layers, `"sua"` (channels of all positions only,
        factored damping).
      recurrence: steps of a layer that is used several times: `"independent"`, `"option1"` or
        `"option2"`.
      axis_name: mapped axis of `shard_map`/`pmap`, if any.
      factor_dtype: dtype of the state, default float32 or the parameters' if wider.
      precision: matmul precision of factor products and solves.
      block: in place of the Kronecker block of dense layers, convolutions and attention
        projections; or a function of the layer that gives every layer its block, such as
        `low_rank_blocks(...)`, and leaves the choices of `inverse`, `sharing`, `positions`,
        `convolution` and `recurrence` without a say.
      factored_gradient: precondition gradients of dense layers from their rows, see
        `scale_by_curvature`.
      coupling: what layers tell each other: `coarse_correction()`, `deflated()`, or `tridiagonal()`
        for chains of dense layers with `inverse="cholesky"`.
      balance: what a coupling adds is added as it is (`"sum"`), as far as an exact quadratic model
        agrees (`"model"`, see `balance_parts`), or stays apart for a step rule that follows
        (`"apart"`, for `quadratic_step`).
      placement: divides refreshes, and the state if it says so, over devices, see `Placement`.

    Returns:
      A transformation; its state is made of arrays only.

    Raises:
      ValueError: a hyperparameter out of range, or KL-clip without a rate.

    >>> import jax.numpy as jnp, kfac_optax as ko
    >>> estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> w, x = jnp.zeros((2, 1)), jnp.eye(2)
    >>> tx = kfac(estimator.layers(w, x), learning_rate=1.0, damping=0.5, kl_clip=None)
    >>> updates, state = tx.update(jnp.ones((2, 1)), tx.init(w), w, curvature=estimator.at(w, x))
    >>> print(updates.ravel())
    [1. 1.]

    Reference: Martens & Grosse, Optimizing Neural Networks with Kronecker-factored Approximate
      Curvature (2015).
    """
    # both bounds are on rate times update
    if learning_rate is None and kl_clip is not None:
        raise ValueError(
            "kfac: got kl_clip without learning_rate; KL-clip bounds the step that will be taken. "
            "Pass learning_rate=, the rate of the optimizer that follows, or kl_clip=None where "
            "what follows decides on the length of the step."
        )
    check_choice("kfac", "bound", bound, BOUNDS)
    check_choice("kfac", "balance", balance, BALANCES)
    # also where no bound counts it
    check_momentum("kfac", momentum)
    if block is None:
        _check_masks(layers, inverse)
    else:  # knows how positions are shared
        check_unused(
            "kfac",
            "block=, which already says so: kronecker(sharing=, positions=)",
            sharing=(sharing, "expand"),
            positions=(positions, None),
        )
    layers = cover(layers, uncovered=uncovered, normalization=normalization, where="kfac")
    asked, bound = bound, _bound_of(layers, bound, kl_clip, balance)
    # weights between units; other kinds of layers have blocks of their own
    linear = kronecker_by(inverse, sharing=sharing, positions=positions, precision=precision)
    block_of = blocks_of(
        linear if block is None else block,
        inverse=inverse,
        normalization=normalization,
        convolution=convolution,
        recurrence=recurrence,
        precision=precision,
    )
    # U_i = (A_i (x) G_i + damping I)^{-1} V_i, and what a coupling adds
    preconditioner = scale_by_curvature(
        layers,
        block=block_of,
        coupling=coupling,
        damping=damping,
        decay=decay,
        curvature_every=curvature_every,
        inverse_every=inverse_every,
        stagger=stagger,
        factored_gradient=factored_gradient,
        separate=coupling is not None and balance != "sum",
        # products for KL-clip, of which the gradient is formed nowhere
        sloped=factored_gradient and coupling is None and bound != "exact",
        axis_name=axis_name,
        factor_dtype=factor_dtype,
        placement=placement,
    )
    # s = min(1, sqrt(kl_clip / ((1 - m)^2 T^T F T))) over the whole step T
    if bound == "exact":
        assert learning_rate is not None and kl_clip is not None
        bounded = functools.partial(
            bound_step,
            preconditioner,
            learning_rate=learning_rate,
            kl_clip=kl_clip,
            damping=damping,
            axis_name=axis_name,
        )
        return _with_momentum(bounded, momentum)
    # the coarse part as far as an exact model agrees
    if coupling is not None and balance == "model":
        preconditioner = balance_parts(preconditioner, damping=damping, axis_name=axis_name)
    # nu = min(1, sqrt(kl_clip / (learning_rate^2 sum_i |<U_i, V_i>|)))
    clipped = clip_by_kl(
        preconditioner, learning_rate=learning_rate, kl_clip=kl_clip, layers=layers
    )
    if bound != "movement":
        return clipped
    assert learning_rate is not None and kl_clip is not None
    # s = min(1, sqrt(kl_clip / ((1 - m)^2 T^T F T))) over the whole step T = m T0 - learning_rate U
    moving = functools.partial(
        bound_movement,
        clipped,
        learning_rate=learning_rate,
        kl_clip=kl_clip,
        required=asked == "movement",
        axis_name=axis_name,
    )
    return _with_momentum(moving, momentum)


def _check_masks(layers: Any, inverse: str) -> None:
    """Raises where exact damping is asked for that a layer cannot have."""
    if inverse != "eigh" or not isinstance(layers, Layers):
        return
    names = [layer.path for layer in layers if layer.mask is not None]
    if names:
        raise ValueError(
            f"kfac: got inverse='eigh' (exact damping) with the masks of {', '.join(names)}, whose "
            "block has factored damping alone; expected 'auto', 'cholesky' or 'newton'. For exact "
            "damping of the other layers pass block=kronecker('eigh')."
        )


def _bound_of(layers: Layers, bound: str, kl_clip: Any, balance: str) -> str:
    """The bound that is taken; what has none here cannot ask for one."""
    for void, why in ((kl_clip is None, "kl_clip=None"), (balance == "apart", "balance='apart'")):
        if not void:
            continue
        if bound != "damped":
            beside = f"{why}: what follows decides on the length of the step"
            check_unused("kfac", beside, bound=(bound, "auto"))
        return "damped"
    if bound != "auto":
        return bound
    # A step turns weights before a normalisation, however long it is: they have no scale.
    weights = sum(_entries(layer) for layer in layers)
    without_scale = sum(_entries(layer) for layer in layers if layer.scale_free)
    return "damped" if 2 * without_scale > weights else "movement"


def _entries(layer: Layer) -> int:
    """Entries of all matrices of a layer, the shift beside them left out."""
    return math.prod(layer.stored)


def _with_momentum(make: Callable[..., Any], momentum: Any) -> Any:
    """A transformation for a momentum, which is known only in an update where it is injected."""
    if isinstance(momentum, jax.Array):
        # (1 - m)^2 has no bound at one: not legal here, as for a plain number
        legal = jnp.where(momentum <= 0.999, momentum, jnp.nan)
        return with_checked(make, momentum=legal)
    return make(momentum=momentum)


def eigen_numbers(s: Sizes) -> int:
    """Both factors, their eigenvectors and eigenvalues."""
    return 2 * (s.p**2 + s.q**2) + s.p + s.q


RECORDS = (
    Method(
        name="kfac",
        kind="preconditioner",
        summary="block-diagonal K-FAC, `(A ⊗ G + λI)⁻¹` per layer (factored damping above 128 "
        "inputs or outputs), then KL-clip, and an exact bound on the whole movement where no "
        'normalisation has that effect; `bound="damped"`: KL-clip alone; `bound="exact"`: steps as '
        "long as an exact model wants them",
        paper="Martens & Grosse (2015)",
        equation="U = (A ⊗ G + λ I)⁻¹ V",
        needs=frozenset({"gradient", "curvature"}),
        state=eigen_numbers,
        state_text="2 (p² + q²) + p + q, without p + q where p or q is above 128",
        cost=("O(d³)", "O(d³)"),
        test="tests/methods/test_two_level_dense.py::test_update_equals_dense_formula",
        build=lambda layers, **options: kfac(layers, **(SHORT_CLIPPED | options)),
        block_of=lambda layer: kronecker(),
    ),
)
