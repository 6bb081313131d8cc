"""AdaHessian: Adam with the diagonal of the Hessian in place of the gradient's squares."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfac_optax._types import PyTree, ScalarOrSchedule
from kfac_optax._validate import check_seed
from kfac_optax.linalg.division import quotient_or_zero
from kfac_optax.methods.gradient.gate import unbiased
from kfac_optax.methods.gradient.hessian_probes import Probes, next_probes, no_probes, probed
from kfac_optax.methods.gradient.stacks import averaged_together, leading_axes
from kfac_optax.methods.gradient.treewise import Made, Rule, Step, transformation, zeros
from kfac_optax.methods.record import Method
from kfac_optax.methods.signature import check_size, flat_signature


class AdaHessianHeld(NamedTuple):
    """What `adahessian` keeps."""

    mean: PyTree  # of the gradients
    probes: Probes  # squares: of the Hessian's diagonal


@flat_signature()
def adahessian(
    *,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-4,
    power: ScalarOrSchedule = 1.0,
    curvature_every: ScalarOrSchedule = 1,
    spatial: Callable[[str], int] | None = None,
    block: int = 1,
    abs_before_average: bool = True,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """AdaHessian: `U = m / (n^{power / 2} + eps)`, `m` the mean of the gradients and `n` that of the
    squares of the Hessian's diagonal.

    The diagonal is `h = z * (H z)` with random signs `z`, `E[h] = diag(H)`, averaged over entries
    that belong together before it is squared. Both means are exponential and bias-corrected. Chain
    it with what takes the step, and with decoupled weight decay.

    `update(grads, state, params, *, value_fn)`: the loss of this batch as a function of the
    parameters (`obj_fn`, as `optax.contrib.sophia` calls it, will do), from which the product with
    the Hessian is taken; or `hvp`, a function that multiplies with it. Both are of the whole batch
    where devices share one: `jax.lax.pmean` in the loss inside `shard_map`, in `hvp` under `pmap`.
    A product that is not finite is left out, and the step goes on.

    Args:
      b1: decay of the gradients' mean.
      b2: decay of the squares' mean.
      eps: added to the root.
      power: of the Hessian, 1 for all of it.
      curvature_every: period of the products, in steps.
      spatial: `name -> number` of leading axes that are averaged over, those of a convolution's
        window. By default all but the last two of leaves with four axes and more; say so where
        these are something else, such as scanned layers or heads. Names are paths,
        `"block/kernel"`.
      block: of the other leaves so many neighbours on the last axis are, where they fill it.
      abs_before_average: averages `|h|`, as the authors' code does; else `h` itself.
      seed: of the signs.

    Returns:
      A transformation; its state has two numbers for every parameter.

    Raises:
      TypeError: a leaf is complex or not floating.
      ValueError: a hyperparameter out of range; an update without `value_fn` or `hvp`; `spatial`
        gives no number of axes of a leaf.

    >>> tx = adahessian(b1=0.0, b2=0.0, eps=0.0)
    >>> w, loss = jnp.array([3.0, -2.0]), lambda w: w[0] ** 2 + 4 * w[1] ** 2
    >>> updates, state = tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)
    >>> print(updates)  # the way to the minimum: the Hessian is diagonal
    [ 3. -2.]

    Reference: Yao et al., ADAHESSIAN: An Adaptive Second Order Optimizer for Machine Learning
      (2020).
    """
    where = "adahessian"
    hyper: dict[str, Any] = dict(b1=b1, b2=b2, eps=eps, power=power)
    hyper["curvature_every"] = curvature_every
    check_size(where, "block", block)
    check_seed(where, seed)

    def start(params: PyTree, dtype: Any) -> AdaHessianHeld:
        probes = no_probes(zeros(params, dtype), seed)
        return AdaHessianHeld(zeros(params, dtype), probes)

    def square(name: str, z: jax.Array, hz: jax.Array) -> jax.Array:
        h = z * hz
        if abs_before_average:
            h = jnp.abs(h)
        # by default the window of a convolution
        axes = h.ndim - 2 if h.ndim >= 4 else 0
        if spatial is not None:
            what = f"{where}: spatial({name!r})"
            axes = leading_axes(what, spatial(name), h.shape, "are averaged over")
        return jnp.square(averaged_together(h, axes, block))

    def step(given: Step) -> Made:
        now, (mean, probes) = given.now, given.held
        squares, taken = probed(where, given, probes, jax.random.rademacher, square)
        b1, b2 = now["b1"], now["b2"]
        mean = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, mean, given.gradient)
        squares = jax.tree.map(lambda n, s: b2 * n + (1 - b2) * s, probes.squares, squares)
        probes = next_probes(probes, squares, taken)

        def direction(m: jax.Array, n: jax.Array) -> jax.Array:
            square = unbiased(n, b2, probes.count)
            root = square ** (now["power"] / 2) + now["eps"]
            # only with eps=0, where there is no curvature
            mean = unbiased(m, b1, given.count + 1)
            return quotient_or_zero(mean, root)

        out = jax.tree.map(direction, mean, probes.squares)
        held = AdaHessianHeld(mean, probes)
        return Made(out, held, probes.count > 0, taken.skipped)

    return transformation(Rule(where, hyper, start, step))


_SHORT: dict[str, Any] = dict(curvature_every=2)

RECORDS = (
    Method(
        name="adahessian",
        kind="preconditioner",
        summary="Adam with the diagonal of the Hessian in place of the gradient's squares, from "
        "products with random signs",
        paper="Yao et al. (2020)",
        equation="U = m / (n^(k/2) + ε), n the mean of (z * H z)²",
        needs=frozenset({"gradient", "value_fn"}),
        state=lambda sizes: 2 * sizes.p * sizes.q,
        state_text="2 p q",
        cost=("a product with the Hessian", "O(d²)"),
        test="tests/methods/test_hessian_diagonals.py::test_adahessian_is_its_recursion",
        build=lambda layers, **options: adahessian(**(_SHORT | options)),
        block_of=None,
        across=lambda layers: 2,  # the bits of the key
    ),
)
