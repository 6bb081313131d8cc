"""A step of SOAP: Adam in the bases, then statistics, then the bases."""

from typing import Any

import jax
import jax.numpy as jnp

from kfac_optax._tree import all_finite, select
from kfac_optax.engine.branches import due_at
from kfac_optax.linalg.division import quotient_or_zero
from kfac_optax.methods.gradient import gate
from kfac_optax.methods.gradient.axiswise import Advanced, Start, Step
from kfac_optax.methods.gradient.kl_phases import levelled
from kfac_optax.methods.gradient.kl_statistics import KL, kl_averaged_in
from kfac_optax.methods.gradient.momenta import zeros
from kfac_optax.methods.gradient.phases import averaged_in, identities
from kfac_optax.methods.gradient.soap_bases import refreshed, rotated, whiteners_of


def start_moments(begin: Start) -> tuple:
    """No statistics, the identity for bases, and moments of zero."""
    factors, bases = {}, {}
    for group in begin.groups:
        bases[group.name] = identities(group, begin.dtype)
        factors[group.name] = jax.tree.map(jnp.zeros_like, bases[group.name])
    return factors, bases, zeros(begin), zeros(begin)


def step_in_bases(step: Step, state: Any, *, basis: str, statistics: str) -> Advanced:
    """A step in the bases that earlier gradients made; then statistics, and bases where due."""
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
            name = group.name
            mine, held = step.tensors[name], state.factors[name]
            if statistics == KL:
                across = whiteners_of(held, state.bases[name])
                new[name] = kl_averaged_in(group, mine, held, weights, across)
            else:
                new[name] = averaged_in(group, mine, held, weights)
        factors, skipped = gate.accepted(new, state.factors, step.finite)
        if statistics == KL:
            for name, own in factors.items():
                factors[name], _ = levelled(own, {})

    def refresh(held: tuple) -> tuple:
        return refreshed(step.groups, factors, held, basis, step.count == 0)

    with jax.named_scope("soap/bases"):
        # periods follow the steps that were accepted
        due = good & due_at(step.count, step.now["inverse_every"])
        # squares live in the bases, and move with them
        held = (state.bases, nu, jnp.zeros((), jnp.int32))
        bases, nu, failed = gate.when_due(due, refresh, held)
    return Advanced(tensors, (factors, bases, mu, nu), good, skipped, failed)


def _adam(step: Step, state: Any) -> tuple[dict, dict, dict]:
    """Adam's direction in the bases of the step before, and its moments."""
    mu, nu, tensors = {}, {}, {}
    # schedules at this step
    b1 = step.value("b1")
    b2 = step.value("b2")
    eps = step.value("eps")
    for group in step.groups:
        name = group.name
        q = state.bases[name]
        # in a basis of its own all but rounding is on the diagonal of a gradient
        t = step.count if q else step.count + 1
        old_mu, old_nu = state.mu[name], state.nu[name]
        # G' = Q_L^T G Q_R
        gradient = step.tensors[name]
        turned = rotated(gradient, q, back=False)
        mean = b1 * old_mu + (1 - b1) * gradient
        # V <- b2 V + (1 - b2) G'^2, in the bases
        square = b2 * old_nu + (1 - b2) * jnp.square(turned)
        mu[name], nu[name] = select(t > 0, (mean, square), (old_mu, old_nu))
        turned_mean = rotated(mu[name], q, back=False)
        # M' / (sqrt(V) + eps), both without their bias; zero where the gradient has always been
        # zero, which only eps=0 divides by
        mean_square = gate.unbiased(nu[name], b2, t)
        divisor = jnp.sqrt(mean_square) + eps
        turned_mean = gate.unbiased(turned_mean, b1, t)
        u = quotient_or_zero(turned_mean, divisor)
        # Q_L (...) Q_R^T
        tensors[name] = rotated(u, q, back=True)
    return tensors, mu, nu
