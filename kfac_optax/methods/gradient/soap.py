"""SOAP: Adam in the eigenbasis of Shampoo's statistics."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfac_optax._layout import varying_as
from kfac_optax._tree import all_finite, select
from kfac_optax._types import PyTree, ScalarOrSchedule
from kfac_optax._validate import Checked, check_choice
from kfac_optax.engine.branches import due_at
from kfac_optax.engine.state import GradientCounts
from kfac_optax.linalg.division import quotient_or_zero
from kfac_optax.linalg.factorize import after, psd_eigh
from kfac_optax.methods.gradient import gate
from kfac_optax.methods.gradient.axes import (
    ALL,
    FULL,
    IDENTITY,
    Group,
    Rules,
    along,
    check_rules,
)
from kfac_optax.methods.gradient.axiswise import Advanced, Axiswise, Start, Step, transformation
from kfac_optax.methods.gradient.kl_statistics import (
    KL,
    OUTER,
    checked_decay,
    kl_averaged_in,
    levelled,
)
from kfac_optax.methods.gradient.momenta import zeros
from kfac_optax.methods.gradient.phases import ByAxis, averaged_in, diagonal_root, identities

BASES = ("qr", "eigh")
_RIDGE = 1e-6  # of inverses in statistics, relative to the largest eigenvalue


class SoapState(NamedTuple):
    """State of `scale_by_soap`. Tensors of equal shape are stacked on axis 0."""

    counts: GradientCounts
    factors: Any  # by group and axis: [copies, n, n]
    bases: Any  # orthogonal matrices by group and axis, [copies, n, n], a direction per column
    mu: Any  # mean of the gradients by group, [copies, *shape]
    nu: Any  # mean of the squares by group, in the bases
    given: dict[str, Checked]  # hyperparameters, as far as they made sense


def scale_by_soap(
    *,
    b1: ScalarOrSchedule = 0.95,
    b2: ScalarOrSchedule = 0.95,
    eps: ScalarOrSchedule = 1e-8,
    decay: ScalarOrSchedule = 0.95,
    inverse_every: ScalarOrSchedule = 10,
    basis: str = "qr",
    statistics: str = OUTER,
    max_dim: int = 4096,
    merge: int = 16,
    long_axes: str = "identity",
    vectors: str = "identity",
    sides: str = ALL,
    stacked: Callable[[str], int] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam in the eigenbasis of Shampoo's statistics.

    For a matrix `G`, with `L` and `R` the averages of `G G^T` and `G^T G` and `Q_L`, `Q_R` their
    eigenvectors:

    `M <- b1 M + (1 - b1) G`,
    `V <- b2 V + (1 - b2) (Q_L^T G Q_R)^2`,
    `U = Q_L [Q_L^T M Q_R / (1 - b1^t) / (sqrt(V / (1 - b2^t)) + eps)] Q_R^T`.

    The bases are eigenvectors at the first step and then follow by one step of the power iteration
    each time they are due, `Q <- qr(L Q)`, with columns, and the entries of `V` with them, in
    descending order of `diag(Q^T L Q)`. Tensors of more axes have a basis for each. An axis that is
    longer than `max_dim` has none (the one-sided form), nor have vectors and scalars: where no axis
    has one this is Adam.

    A step is taken in the bases that earlier gradients made; then come statistics, and bases where
    they are due. In a basis of its own a gradient is diagonal up to rounding, and Adam would make
    rounding as large as the rest. So the first gradient of a tensor with a basis makes that and
    nothing else: its update is zero, and `t` counts from the second. Where no axis has a basis the
    first step is Adam's. Leaves are seen as in `scale_by_shampoo`, and what is not finite is treated
    the same way: a bad gradient changes nothing, a basis that fails is kept.

    Args:
      b1: decay of the mean of the gradients.
      b2: decay of the mean of the squares in the bases.
      eps: added to the root.
      decay: of the statistics, `L <- e L + (1 - e) G G^T`, `e = min(1 - 1/t, decay)`; 1 sums them.
      inverse_every: period of the bases, in steps.
      basis: `"qr"`, the power iteration; `"eigh"`, eigenvectors every time.
      statistics: `"outer"`, those above; `"kl"`, those whose product is nearest to the second
        moment of the gradient, `L <- e L + (1 - e) G R^(-1) G^T / q` and the same of `R` with
        `R^(-1) = Q_R diag(Q_R^T R Q_R)^(-1) Q_R^T`, for averages (KL-SOAP).
      max_dim: axes longer than this are long.
      merge: neighbouring axes are merged, from the left, while their product is at most this and
        two axes are left; 1 merges none.
      long_axes: `"identity"` gives a long axis no basis, `"split"` cuts it into equal pieces.
      vectors: `"identity"` (Adam) or `"full"`, for leaves with one axis.
      sides: `"all"` axes have a basis, or the `"short"` one alone, the first of equally short ones
        (the one-sided form).
      stacked: `name -> number` of leading axes that only count equal parameters, as those of
        scanned layers; default none. Names are paths, `"block/kernel"`.

    Returns:
      A transformation whose state is a `SoapState` of arrays in float32 or wider; updates have the
      dtypes of the gradient.

    Raises:
      TypeError: a leaf is complex or not floating; a size is no Python integer.
      ValueError: a hyperparameter out of range; gradients of other parameters than `init` got.

    >>> tx = scale_by_soap()
    >>> g = jnp.array([[3.0, 0.0], [0.0, -0.5]])
    >>> _, state = tx.update(g, tx.init(g))
    >>> updates, state = tx.update(g, state)
    >>> print(updates.round(3) + 0)
    [[ 1.  0.]
     [ 0. -1.]]

    Reference: Vyas, Morwani, Zhao, Kwun, Shapira, Brandfonbrener, Janson & Kakade, SOAP: Improving
      and Stabilizing Shampoo using Adam (2024), algorithm 3; Lin, Lowe, Dangel, Eschenhagen, Xu &
      Grosse, Understanding and Improving Shampoo and SOAP via Kullback-Leibler Minimization (2025),
      for `"kl"`.
    """
    where = "scale_by_soap"
    rules = Rules(max_dim, merge, long_axes, vectors, stacked, sides)
    check_rules(where, rules, (IDENTITY, "split"), (IDENTITY, FULL))
    check_choice(where, "basis", basis, BASES)
    decay = checked_decay(where, statistics, decay)
    hyper: dict[str, Any] = dict(b1=b1, b2=b2, eps=eps, decay=decay, inverse_every=inverse_every)

    def advance(step: Step, state: Any) -> Advanced:
        with jax.named_scope("soap/adam"):
            tensors, mu, nu = _adam(step, state)
        # squares that overflow would stay for ever
        good = step.finite & all_finite((tensors, nu))
        mu, nu = select(good, (mu, nu), (state.mu, state.nu))
        with jax.named_scope("soap/statistics"):
            # e H_i + (1 - e) mat_i(G) mat_i(G)^T
            weights = gate.averaged(step.now["decay"], step.count + 1, step.dtype)
            new = {}
            for group in step.groups:
                mine, held = step.tensors[group.name], state.factors[group.name]
                if statistics == KL:
                    across = _whiteners(held, state.bases[group.name])
                    new[group.name] = kl_averaged_in(group, mine, held, weights, across)
                else:
                    new[group.name] = averaged_in(group, mine, held, weights)
            factors, skipped = gate.accepted(new, state.factors, step.finite)
            if statistics == KL:
                factors = {name: levelled(own, {})[0] for name, own in factors.items()}

        def refresh(held: tuple) -> tuple:
            return _refreshed(step.groups, factors, held, basis, step.count == 0)

        with jax.named_scope("soap/bases"):
            # periods follow the steps that were accepted
            due = good & due_at(step.count, step.now["inverse_every"])
            # squares live in the bases, and move with them
            held = (state.bases, nu, jnp.zeros((), jnp.int32))
            bases, nu, failed = gate.when_due(due, refresh, held)
        return Advanced(tensors, (factors, bases, mu, nu), good, skipped, failed)

    return transformation(Axiswise(where, rules, hyper, SoapState, "mu", _start, advance))


def _start(begin: Start) -> tuple:
    """No statistics, the identity for bases, and moments of zero."""
    factors, bases = {}, {}
    for group in begin.groups:
        bases[group.name] = identities(group, begin.dtype)
        factors[group.name] = jax.tree.map(jnp.zeros_like, bases[group.name])
    return factors, bases, zeros(begin), zeros(begin)


def _adam(step: Step, state: Any) -> tuple[dict, dict, dict]:
    """Adam's direction in the bases of the step before, and its moments."""
    mu, nu, tensors = {}, {}, {}
    # schedules at this step
    b1, b2, eps = (step.value(name) for name in ("b1", "b2", "eps"))
    for group in step.groups:
        name, q = group.name, state.bases[group.name]
        # in a basis of its own all but rounding is on the diagonal of a gradient
        t = step.count if q else step.count + 1
        old = state.mu[name], state.nu[name]
        # G' = Q_L^T G Q_R
        turned = _rotated(step.tensors[name], q, back=False)
        mean = b1 * old[0] + (1 - b1) * step.tensors[name]
        # V <- b2 V + (1 - b2) G'^2, in the bases
        square = b2 * old[1] + (1 - b2) * jnp.square(turned)
        mu[name], nu[name] = select(t > 0, (mean, square), old)
        turned_mean = _rotated(mu[name], q, back=False)
        # M' / (sqrt(V) + eps), both without their bias; zero where the gradient has always been
        # zero, which only eps=0 divides by
        divisor = jnp.sqrt(gate.unbiased(nu[name], b2, t)) + eps
        u = quotient_or_zero(gate.unbiased(turned_mean, b1, t), divisor)
        # Q_L (...) Q_R^T
        tensors[name] = _rotated(u, q, back=True)
    return tensors, mu, nu


def _whiteners(factors: ByAxis, bases: ByAxis) -> ByAxis:
    """`W` with `W^T W = Q diag(Q^T H Q)^(-1) Q^T`, by axis."""
    made = {}
    for axis, q in bases.items():
        with jax.default_matmul_precision("highest"):
            values = jnp.sum(q * (factors[axis] @ q), axis=1)
        # a direction that rounding alone knows counts as much as one of this share
        roots = diagonal_root(values, 2, jnp.asarray(_RIDGE, q.dtype))
        made[axis] = roots[:, :, None] * q.mT
    return made


def _rotated(
    tensors: jax.Array,
    bases: dict[str, jax.Array],
    *,
    back: bool,
) -> jax.Array:
    """Into the bases, `G x_i Q_i^T`, or back out of them."""
    for axis, q in bases.items():
        tensors = along(tensors, int(axis), q if back else q.mT)
    return tensors


def _refreshed(
    groups: tuple[Group, ...],
    factors: gate.Held,
    held: tuple,
    basis: str,
    first: jax.Array,
) -> tuple:
    """New bases, squares in the order of their columns, and how many failed; one batched call after
    another.
    """
    bases, nu, failed = held
    out: gate.Held = {}
    squares = dict(nu)
    previous: PyTree = ()
    for group in groups:
        out[group.name] = {}
        for axis, q in bases[group.name].items():
            ready = after(factors[group.name][axis], previous)
            if basis == "eigh":
                new, order = _eigenvectors(ready, q)
            else:
                # a first basis from scratch, later ones by a step of power iteration
                new, order = jax.lax.cond(first, _eigenvectors, _power_step, ready, q)
            previous = new
            good = jax.vmap(all_finite)(new)
            out[group.name][axis] = select(good, new, q)
            moved = _in_order(squares[group.name], int(axis), order)
            squares[group.name] = select(good, moved, squares[group.name])
            failed = failed + jnp.sum(~good, dtype=jnp.int32)
    return out, squares, failed


def _eigenvectors(matrices: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvectors, the largest value first; squares stay with the rank of the value."""
    # psd_eigh gives values in ascending order
    vectors = jax.vmap(psd_eigh)(matrices).vectors[..., ::-1]
    order = jnp.broadcast_to(jnp.arange(q.shape[-1]), q.shape[:-1])
    return vectors, varying_as(order, matrices)


def _power_step(matrices: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One orthogonalised product with columns in descending order of their Rayleigh quotients."""
    with jax.default_matmul_precision("highest"):
        products = matrices @ q
        # q_j^T H q_j
        values = jnp.sum(q * products, axis=1)
        order = jnp.argsort(-values, axis=-1)
        sorted_products = jnp.take_along_axis(products, order[:, None, :], axis=2)
        # positions have no part in what JAX knows of devices
        return jnp.linalg.qr(sorted_products)[0], varying_as(order, matrices)


def _in_order(tensors: jax.Array, axis: int, order: jax.Array) -> jax.Array:
    shape = [1] * tensors.ndim
    # [copies, 1, ..., n, ..., 1]
    shape[0], shape[axis + 1] = order.shape
    return jnp.take_along_axis(tensors, order.reshape(shape), axis=axis + 1)
