"""ESGD: gradients divided by the norms of the Hessian's rows."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from kfac_optax._types import PyTree, ScalarOrSchedule
from kfac_optax._validate import check_number, check_seed
from kfac_optax.methods.gradient.hessian_probes import Probes, next_probes, no_probes, probed
from kfac_optax.methods.gradient.treewise import Made, Rule, Step, transformation, zeros
from kfac_optax.methods.record import Method
from kfac_optax.methods.signature import flat_signature


@flat_signature()
def esgd(
    *,
    damping: ScalarOrSchedule = 1e-4,
    curvature_every: ScalarOrSchedule = 20,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Equilibrated SGD: `U = V / (sqrt(D) + damping)`, `D` the mean of `(H z)^2` over random
    vectors `z ~ N(0, I)`.

    `E[(H z)_i^2] = |H_i|^2`, the squared norm of a row of the Hessian: positive at saddles too,
    where its diagonal may vanish. All probes count the same. Chain it with what takes the step.

    `update(grads, state, params, *, value_fn)`, or `hvp`, as for `adahessian`.

    Args:
      damping: positive; in units of the Hessian.
      curvature_every: period of the products, in steps.
      seed: of the vectors.

    Returns:
      A transformation; its state has one number for every parameter.

    Raises:
      TypeError: a leaf is complex or not floating.
      ValueError: a hyperparameter out of range; an update without `value_fn` or `hvp`.

    >>> tx = esgd(damping=1.0)
    >>> w, g = jnp.zeros(2), jnp.array([3.0, 4.0])
    >>> updates, state = tx.update(g, tx.init(w), w, hvp=lambda z: jnp.array([2.0, 0.0]))
    >>> print(updates)
    [1. 4.]

    Reference: Dauphin, de Vries & Bengio, Equilibrated adaptive learning rates for non-convex
      optimization (2015).
    """
    where = "esgd"
    check_number(where, "damping", damping, above=0, schedule=True)
    check_seed(where, seed)
    hyper: dict[str, Any] = dict(damping=damping, curvature_every=curvature_every)

    def start(params: PyTree, dtype: Any) -> Probes:
        return no_probes(zeros(params, dtype), seed)

    # E[(H z)^2] of standard normal z: the squared norms of the rows of H
    def square(name: str, z: jax.Array, hz: jax.Array) -> jax.Array:
        return jnp.square(hz)

    def step(given: Step) -> Made:
        old: Probes = given.held
        squares, taken = probed(where, given, old, jax.random.normal, square)
        # the mean over all probes
        share = 1 / (old.count + 1).astype(given.now["damping"].dtype)
        mean = jax.tree.map(lambda d, s: d + share * (s - d), old.squares, squares)
        probes = next_probes(old, mean, taken)

        def direction(g: jax.Array, d: jax.Array) -> jax.Array:
            norm = jnp.sqrt(d)
            return g / (norm + given.now["damping"])

        out = jax.tree.map(direction, given.gradient, probes.squares)
        return Made(out, probes, probes.count > 0, taken.skipped)

    return transformation(Rule(where, hyper, start, step))


_SHORT: dict[str, Any] = dict(curvature_every=2, damping=0.05)

RECORDS = (
    Method(
        name="esgd",
        kind="preconditioner",
        summary="gradients divided by the norms of the Hessian's rows, from products with random "
        "vectors",
        paper="Dauphin, de Vries & Bengio (2015)",
        equation="U = V / (D^(1/2) + λ), D the mean of (H z)²",
        needs=frozenset({"gradient", "value_fn"}),
        state=lambda sizes: sizes.p * sizes.q,
        state_text="p q",
        cost=("a product with the Hessian", "O(d²)"),
        test="tests/methods/test_hessian_diagonals.py::test_esgd_divides_by_norms_of_rows",
        build=lambda layers, **options: esgd(**(_SHORT | options)),
        block_of=None,
        across=lambda layers: 2,  # the bits of the key
    ),
)
