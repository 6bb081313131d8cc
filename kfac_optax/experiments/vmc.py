"""Variational Monte Carlo: walkers, local energies, the training of a run and its evaluation."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax

import kfac_optax as ko
from kfac_optax.experiments import ferminet

LogPsi = Callable[[jax.Array], jax.Array]  # walkers `[N, n, 3]` to `log |psi|` `[N]`
Schedule = Callable[[Any], Any]


class Walkers(NamedTuple):
    """Samples of `|psi|^2`, and the width of their moves."""

    x: jax.Array  # [N, n, 3]
    width: jax.Array  # []


class Log(NamedTuple):
    """One row for every step of a run."""

    energy: jax.Array  # mean local energy of the walkers, as they are
    deviation: jax.Array  # standard deviation of local energies
    acceptance: jax.Array  # share of moves


class Method(NamedTuple):
    """An optimizer: its label, whether updates need `curvature=`, and how it is built.

    `build(config, layers, schedule)` makes the transformation; the layers are those that the
    library found. With `residual` updates get local energies about their mean as well.
    """

    label: str
    curvature: bool
    build: Callable[[ml_collections.ConfigDict, Any, Schedule], optax.GradientTransformation]
    residual: bool = False


def _kfac(config: ml_collections.ConfigDict, layers: Any, schedule: Schedule) -> Any:
    natural = ko.kfac(layers, learning_rate=schedule, **config.kfac.to_dict())
    return optax.chain(natural, optax.sgd(schedule))


def _adam(config: ml_collections.ConfigDict, layers: Any, schedule: Schedule) -> Any:
    del config, layers
    return optax.adam(schedule)


def _spring(config: ml_collections.ConfigDict, layers: Any, schedule: Schedule) -> Any:
    del layers  # scores are centred: the kernel is made of products with J
    return ko.spring(learning_rate=schedule, **config.spring.to_dict())


METHODS = {
    "kfac": Method("K-FAC", True, _kfac),
    "spring": Method("SPRING", True, _spring, residual=True),
    "adam": Method("Adam", False, _adam),
}


def local_energies(log_psi: LogPsi, x: jax.Array, charge: float) -> jax.Array:
    """`(H psi)(x) / psi(x)` of every walker, in hartree.

    `-1/2 sum_i (d_i^2 log psi + (d_i log psi)^2) - sum_i Z / r_i + sum_{i<j} 1 / r_ij`, with the
    second derivatives by forward mode over the gradient, one coordinate at a time.

    Args:
      log_psi: `[N, n, 3] -> [N]`, each walker by itself.
      x: `[N, n, 3]`.
      charge: `Z` of the nucleus at the origin.

    >>> ground = lambda x: -jnp.sum(jnp.linalg.norm(x, axis=-1), -1)  # of hydrogen
    >>> print(local_energies(ground, jnp.array([[[0.3, 0.4, 1.2]]]), 1.0).round(4))
    [-0.5]
    """
    gradient, along = jax.linearize(jax.grad(lambda x: jnp.sum(log_psi(x))), x)
    axes = jnp.eye(x[0].size, dtype=x.dtype).reshape(-1, 1, *x.shape[1:])
    second = jax.vmap(lambda e: jnp.sum(along(jnp.broadcast_to(e, x.shape)) * e, (1, 2)))(axes)
    kinetic = -0.5 * (jnp.sum(second, 0) + jnp.sum(gradient**2, (1, 2)))
    return kinetic + potential(x, charge)


def potential(x: jax.Array, charge: float) -> jax.Array:
    """Energy of the charges: electrons attracted by the nucleus, repelled by each other."""
    first, second = jnp.triu_indices(x.shape[1], 1)
    apart = jnp.linalg.norm(x[:, first] - x[:, second], axis=-1)
    return jnp.sum(1 / apart, -1) - charge * jnp.sum(1 / jnp.linalg.norm(x, axis=-1), -1)


def clipped(energies: jax.Array, factor: float) -> jax.Array:
    """Energies within `factor` times their mean absolute deviation from the median.

    >>> print(clipped(jnp.array([-1.0, 0.0, 0.0, 1.0, 98.0]), 2.0))
    [-1.  0.  0.  1. 40.]
    """
    middle = jnp.median(energies)
    reach = factor * jnp.mean(jnp.abs(energies - middle))
    return jnp.clip(energies, middle - reach, middle + reach)


def move(log_psi: LogPsi, walkers: Walkers, key: jax.Array, moves: int) -> tuple[Walkers, Any]:
    """`moves` Metropolis steps of all electrons at once; also the share of moves accepted.

    The width of the next moves follows that share, towards a half.
    """

    def step(carry: tuple[jax.Array, jax.Array], key: jax.Array) -> tuple[Any, jax.Array]:
        x, log = carry
        step_key, accept_key = jax.random.split(key)
        new = x + walkers.width * jax.random.normal(step_key, x.shape, x.dtype)
        new_log = log_psi(new)
        # log of a uniform number; a comparison with NaN is false, and the walker stays
        accept = -jax.random.exponential(accept_key, log.shape, log.dtype) < 2 * (new_log - log)
        x = jnp.where(accept[:, None, None], new, x)
        return (x, jnp.where(accept, new_log, log)), jnp.mean(accept)

    start = walkers.x, log_psi(walkers.x)
    (x, _), accepted = jax.lax.scan(step, start, jax.random.split(key, moves))
    share = jnp.mean(accepted)
    return Walkers(x, walkers.width * jnp.where(share > 0.5, 1.1, 1 / 1.1)), share


class Trained(NamedTuple):
    """What training has found."""

    params: Any
    walkers: Walkers
    log: Log  # [steps]


def train(
    config: ml_collections.ConfigDict, method: Method, rate: jax.Array, key: jax.Array
) -> Trained:
    """The training of a whole run, compiled as one scan; learning rate and key may be traced.

    Args:
      config: the experiment.
      method: one of `METHODS`.
      rate: learning rate at the start; after `config.delay` steps it is half that.
      key: of parameters and walkers.
    """
    atom = ferminet.Atom(**config.atom.to_dict())
    keys = jax.random.split(key, 4)
    params = ferminet.init(keys[0], atom, ferminet.Widths(**config.network.to_dict()))
    log_psi = functools.partial(_log_modulus, atom=atom)
    x = jax.random.normal(keys[1], (config.walkers, atom.electrons, 3))
    walkers = Walkers(x, jnp.asarray(config.move_width, x.dtype))
    walkers = settle(config, functools.partial(log_psi, params), walkers, keys[2])
    estimator = ko.ggn(lambda params, x: ko.LogAmplitude(log_psi(params, x)))
    schedule = lambda count: rate / (1 + count / config.delay)
    layers = estimator.layers(params, x) if method.curvature else None
    tx = optax.with_extra_args_support(method.build(config, layers, schedule))

    def step(carry: Any, key: jax.Array) -> tuple[Any, Log]:
        params, opt_state, walkers = carry
        walkers, energies, log = measure(config, functools.partial(log_psi, params), walkers, key)
        kept = clipped(energies, config.clip)
        loss = lambda p: ko.LogAmplitude(log_psi(p, walkers.x)).energy(kept)
        grads = jax.grad(loss)(params)
        extra: dict[str, Any] = {}
        if method.curvature:
            extra["curvature"] = estimator.at(params, walkers.x)
        if method.residual:  # one row a walker, the gradient is that of these numbers
            extra["residual"] = [(kept - jnp.mean(kept))[:, None]]
        updates, opt_state = tx.update(grads, opt_state, params, **extra)
        return (optax.apply_updates(params, updates), opt_state, walkers), log

    carry = params, tx.init(params), walkers
    carry, log = jax.lax.scan(step, carry, jax.random.split(keys[3], config.steps))
    return Trained(carry[0], carry[2], log)


def settle(
    config: ml_collections.ConfigDict, log_psi: LogPsi, walkers: Walkers, key: jax.Array
) -> Walkers:
    """Walkers after `config.burn_in` rounds of moves."""

    def step(walkers: Walkers, key: jax.Array) -> tuple[Walkers, jax.Array]:
        return move(log_psi, walkers, key, config.moves)

    return jax.lax.scan(step, walkers, jax.random.split(key, config.burn_in))[0]


def measure(
    config: ml_collections.ConfigDict, log_psi: LogPsi, walkers: Walkers, key: jax.Array
) -> tuple[Walkers, jax.Array, Log]:
    """A round of moves, and local energies where it ends, `[N]`."""
    walkers, share = move(log_psi, walkers, key, config.moves)
    energies = local_energies(log_psi, walkers.x, config.atom.charge)
    return walkers, energies, Log(jnp.mean(energies), jnp.std(energies), share)


def evaluate(
    config: ml_collections.ConfigDict, params: Any, walkers: Walkers, key: jax.Array
) -> Log:
    """Energies under fixed parameters, not clipped, `config.evaluations` rounds of moves.

    The width of the moves is settled beforehand: one that follows the walkers would bias them.
    """
    atom = ferminet.Atom(**config.atom.to_dict())
    log_psi = functools.partial(_log_modulus, params, atom=atom)

    def step(walkers: Walkers, key: jax.Array) -> tuple[Walkers, Log]:
        moved, _, log = measure(config, log_psi, walkers, key)
        return moved._replace(width=walkers.width), log

    settle_key, key = jax.random.split(key)
    walkers = settle(config, log_psi, walkers, settle_key)
    return jax.lax.scan(step, walkers, jax.random.split(key, config.evaluations))[1]


def _log_modulus(params: Any, x: jax.Array, atom: ferminet.Atom) -> jax.Array:
    return ferminet.log_psi(params, x, atom)[1]
