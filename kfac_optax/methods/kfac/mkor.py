"""MKOR: inverse factors followed by rank-one updates."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from kfac_optax._tree import all_finite
from kfac_optax._types import Layers, PyTree, ScalarOrSchedule
from kfac_optax._validate import check_choice, check_number
from kfac_optax.blocks.rank_one.mkor import mkor_block
from kfac_optax.engine.choice import cover, leave_out
from kfac_optax.engine.core import scale_by_curvature
from kfac_optax.engine.uncovered import WITHOUT_DIAGONAL
from kfac_optax.methods.record import Method, Sizes
from kfac_optax.methods.signature import flat_signature
from kfac_optax.step_rules.graft import graft_norm

# a scale has no input side; inverses of the size of a vocabulary have no room
LEFT_OUT = ("scale_shift", "tied_embedding", "embedding", "masked")


@flat_signature()
def mkor(
    layers: Layers,
    *,
    decay: ScalarOrSchedule = 0.95,
    curvature_every: ScalarOrSchedule = 10,
    form: str = "exact",
    threshold: float | None = 2.0,
    mixing: float = 0.9,
    largest: float = 100.0,
    uncovered: str = "graft",
    sharing: str = "expand",
    axis_name: Any = None,
    factor_dtype: Any = None,
    inverse_dtype: Any = None,
    precision: jax.lax.PrecisionLike = "highest",
) -> optax.GradientTransformationExtraArgs:
    """MKOR: `U_i = J_A V_i J_G` with inverse factors that follow the mean input and the mean output
    gradient of each layer by rank-one updates, scaled to the norm of `V_i`.

    `J_A` is the inverse of `A <- decay A + (1 - decay) a a^T`, by Sherman & Morrison, and so is
    `J_G` of `G` with `b b^T`, see `mkor_block`: there is no factorisation, no damping, and a layer
    tells other devices two vectors. As the update has the norm of the gradient, the rate of the
    first-order method that follows stays as it was: `optax.chain(mkor(layers), optax.sgd(lr, 0.9))`.
    Output gradients have to be those of the data's own losses, as for `eva`.

    Args:
      layers: from `empirical_fisher(...).layers(params, *args)`, or another estimator's.
      decay: weight of the old factors, positive.
      curvature_every: period of the updates of the inverses.
      form: `"exact"`, `"blend"` or `"sum"`, see `mkor_block`.
      threshold: largest entry of an inverse before it is mixed with the identity; `None` for none.
      mixing: weight of the inverse then.
      largest: entries of the means are cut to this size.
      uncovered: parameters without a block, among them embeddings, whose inverse would be as large
        as the square of the vocabulary, scales and shifts: `"graft"` (their gradient with the
        size of the others' updates), `"pass"` (as it is) or `"raise"`.
      sharing: `"expand"` or `"reduce"`, see `rank_one`.
      axis_name: mapped axis of `shard_map`/`pmap`, if any.
      factor_dtype: dtype of the statistics, default float32 or the parameters' if wider.
      inverse_dtype: dtype in which inverses are kept, such as `jnp.bfloat16`; default that of the
        statistics.
      precision: matmul precision of updates and solves.

    Returns:
      A transformation; its state is made of arrays only.

    Raises:
      ValueError: a number out of range, an unknown word; at the first update, an estimator whose
        output gradients have mean zero.

    >>> import jax.numpy as jnp, kfac_optax as ko
    >>> loss = lambda w, x: ko.tap_dense(x @ w, x, w)[:, 0]
    >>> estimator, w, x = ko.empirical_fisher(loss), jnp.zeros((2, 1)), jnp.array([[1.0, 0.0]])
    >>> tx = mkor(estimator.layers(w, x), decay=0.5)
    >>> updates, state = tx.update(jnp.ones((2, 1)), tx.init(w), w, curvature=estimator.at(w, x))
    >>> print([f"{u:.3f}" for u in updates.ravel()])  # in the proportion of J_A = diag(1, 2)
    ['0.632', '1.265']

    Reference: Mozaffari, Li, Zhang & Mehri Dehnavi, MKOR: Momentum-Enabled Kronecker-Factor-Based
      Optimizer Using Rank-1 Updates (2023).
    """
    check_choice("mkor", "uncovered", uncovered, WITHOUT_DIAGONAL)
    # the update divides by it
    check_number("mkor", "decay", decay, above=0, at_most=1, schedule=True)
    layers = cover(layers, where="mkor")
    # what is left out is left over, and named so, before `uncovered` decides about it
    layers = leave_out(layers, LEFT_OUT, "{kind}: no inverse factors of rank-one updates")
    layers = cover(layers, uncovered=uncovered, where="mkor")
    # J_A <- (decay J_A^{-1} + (1 - decay) a a^T)^{-1}, and J_G with b
    block = mkor_block(
        form,
        threshold=threshold,
        mixing=mixing,
        largest=largest,
        inverse_dtype=inverse_dtype,
        sharing=sharing,
        precision=precision,
    )
    preconditioner = scale_by_curvature(
        layers,
        block=lambda layer: block,
        decay=decay,
        curvature_every=curvature_every,
        inverse_every=1,  # nothing is factorised
        axis_name=axis_name,
        factor_dtype=factor_dtype,
    )
    # a gradient that is not finite has no norm to give
    norm_of = optax.stateless(lambda updates, params: _zero_unless_finite(updates))
    # J_A V J_G |V| / |J_A V J_G|, layer by layer
    return graft_norm(preconditioner, norm_of=norm_of, layers=layers)


def _zero_unless_finite(tree: PyTree) -> PyTree:
    good = all_finite(tree)
    return jax.tree.map(lambda x: jnp.where(good, x, 0), tree)


def _numbers(sizes: Sizes) -> int:
    """Both inverses, and the averages of the means."""
    # J_A, J_G, a and b
    return sizes.p**2 + sizes.q**2 + sizes.p + sizes.q


SHORT: dict[str, Any] = dict(curvature_every=2)
COMMON: dict[str, Any] = dict(
    kind="preconditioner",
    paper="Mozaffari, Li, Zhang & Mehri Dehnavi (2023)",
    state=_numbers,
    state_text="p² + q² + p + q",
    # a rank-one update is products with a vector, a step products with matrices
    cost=("O(d²)", "O(d³)"),
    block_of=lambda layer: mkor_block(),
)

RECORDS = (
    Method(
        name="mkor",
        summary="inverse factors followed by rank-one updates with mean input and mean output "
        "gradient, no factorisation, the norm of the gradient; data as for `eva`",
        equation="U = J_A V J_G ‖V‖ / ‖J_A V J_G‖, J_A = (γ J_A⁻¹ + (1 - γ) a aᵀ)⁻¹",
        needs=frozenset({"gradient", "curvature", "losses"}),
        test="tests/blocks/test_mkor.py::test_exact_updates_are_the_inverse_of_the_average",
        build=lambda layers, **options: mkor(layers, **(SHORT | options)),
        **COMMON,
    ),
)
