"""An amplitude that is not normalised: the wave function of variational Monte Carlo."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kfac_optax.likelihoods import _common


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogAmplitude:
    """An unnormalised amplitude at samples (walkers) of its own square, `p(x) ~ |psi(x)|^2`.

    Walkers stand for the distribution as they are: no labels are drawn. With `O_b` the derivative
    of `log psi(x_b)`, and `E` and `Cov` over the walkers (weighted), the metric is

        F = 4 Re Cov[O] = 4 Re (E[conj(O) O^T] - E[conj(O)] E[O]^T),

    four times the real part of the quantum geometric tensor, that is
    `4 Cov[d Re log psi] + 4 Cov[d Im log psi]`. For real `psi` it is the Fisher information of `p`
    itself, since `d log p = 2 (O - E[O])`. The mean is taken off since `psi` is known up to a
    factor: a change of that factor is no change.

    Damping is in these units. Stochastic reconfiguration is usually written with `Cov[O]`, a
    quarter: damping `d` there is `4 d` here, and directions here are a quarter as long. A Gaussian
    of variance 1/2 around `log |psi|` measures `2 E[O O^T]`, half, and not centred: damping `d`
    there is `2 d` here.

    Exact products, and what is summed over the walkers before it is squared (diagonals of left-over
    parameters, layers whose rows all walkers share), are centred. A Kronecker factor, as every
    other statistic of rows of single walkers, sees one walker at a time and cannot be: there `G` is
    `4 E[g g^T]` about zero, as K-FAC for wave functions does, each walker counting `1 - w_b / N` of
    its weight `w_b` (mean one) on average over the signs drawn. It overestimates directions that
    change the norm of `psi`, along which the gradient of the energy vanishes.

    Args:
        log_psi: `log psi` of every walker, `[N]`: real (`log |psi|`) or complex
            (`jax.lax.complex(log_modulus, phase)`).
        weights: Non-negative weights of the walkers or a 0/1 mask, `[N]`; None means all ones.

    Raises:
        ValueError: `weights` has another shape than `log_psi`.
        TypeError: `log_psi` is of an integer type.

    Reference: Sorella (1998), Green Function Monte Carlo with Stochastic Reconfiguration, on the
      metric; Pfau, Spencer, Matthews & Foulkes (2020), Ab initio solution of the many-electron
      Schroedinger equation with deep neural networks, on K-FAC for it.

    >>> amplitude = LogAmplitude(jnp.array([0.0, -1.0]))
    >>> print(amplitude.energy(jnp.array([-2.0, -4.0])))
    -3.0
    >>> print(jax.grad(lambda u: LogAmplitude(u).energy(jnp.array([-2.0, -4.0])))(jnp.zeros(2)))
    [ 1. -1.]
    """

    log_psi: jax.Array
    weights: jax.Array | None = None

    centred = True  # the estimators take the mean over the walkers off

    def __post_init__(self) -> None:
        if not _common.has_shape(self.log_psi):
            return
        if not jnp.issubdtype(self.log_psi.dtype, jnp.inexact):
            raise TypeError(
                f"LogAmplitude: log_psi has dtype {self.log_psi.dtype}; expected real or complex "
                "floating-point numbers, log psi of every walker."
            )
        _common.check_weights(
            "LogAmplitude",
            weights=self.weights,
            batch_shape=self.batch_shape,
            advice="A walker is one term.",
        )

    @property
    def natural(self) -> tuple[jax.Array, ...]:
        """The real arrays that the metric differentiates: `(log |psi|,)`, or that and the phase.

        Raises:
            ValueError: `log_psi` is no array `[N]`.
        """
        if self.log_psi.ndim > 1:
            raise ValueError(
                f"LogAmplitude: log_psi has shape {self.log_psi.shape}, expected [N], one number "
                "per walker. Flatten axes of walkers; give each state of several a LogAmplitude of "
                "its own, since each has a norm of its own."
            )
        # real and imaginary part of log psi: amplitude and phase
        if jnp.iscomplexobj(self.log_psi):
            amplitude = _part(jnp.real, self.log_psi)
            return amplitude, _part(jnp.imag, self.log_psi)
        return (self.log_psi,)

    def with_natural(self, natural: tuple[jax.Array, ...]) -> "LogAmplitude":
        """Returns the same likelihood at another `log psi`, given by its real arrays."""
        # back from the real arrays
        log_psi = natural[0] if len(natural) == 1 else jax.lax.complex(*natural)
        return dataclasses.replace(self, log_psi=log_psi)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Shape of the terms, `(N,)`."""
        return self.log_psi.shape

    @property
    def num_columns(self) -> int:
        """Number of columns of `S`: one, or two of a complex amplitude."""
        return len(self.natural)

    def energy(self, local_energies: jax.Array) -> jax.Array:
        """Mean energy of the walkers, with the gradient of variational Monte Carlo.

        The value is `E = sum(w e) / sum(w)`, the real part. The gradient is not its derivative at
        fixed walkers but that of the expectation over moving ones,
        `2 Re sum(w conj(e - E) d log psi) / sum(w)`. Local energies are constants here, so
        clipping them beforehand is up to the caller. On several devices each takes the mean of its
        own walkers for `E`.

        Args:
            local_energies: `e_b = (H psi)(x_b) / psi(x_b)`, `[N]`, real or complex; any value where
                the weight is 0.

        Returns:
            A real scalar; 0 where all weights are 0.

        Raises:
            ValueError: `local_energies` has another shape than `log_psi`.
        """
        shape = self.batch_shape
        _common.check_targets("LogAmplitude.energy", targets=local_energies, shape=shape)
        constant = jax.lax.stop_gradient(jnp.asarray(local_energies))
        constant = _common.widen(constant)
        e = _common.mask_out(constant, weights=self.weights, fill=0)
        log_psi = _common.widen(self.log_psi)
        log_psi = _common.mask_out(log_psi, weights=self.weights, fill=0)
        mean = self._mean(e)
        # A surrogate whose value is of no interest; the mean makes it blind to the norm of psi.
        surrogate = 2 * self._mean(_real_product(e - mean, log_psi))
        return mean.real + surrogate - jax.lax.stop_gradient(surrogate)

    def nll(self, targets: jax.Array) -> jax.Array:
        """`-2 Re(conj(t) log psi)`: minus `log p` of a walker that counts `t` times, up to its norm.

        Args:
            targets: `[N]`: ones for walkers as they are; `sample` draws signs.

        Returns:
            `[N]`, float32 or wider, unweighted.

        Raises:
            ValueError: `targets` has another shape than `log_psi`.
        """
        _common.check_targets("LogAmplitude", targets=targets, shape=self.batch_shape)
        log_psi = _common.widen(self.log_psi)
        return -2 * _real_product(jnp.asarray(targets), log_psi)

    def mean_nll(self, targets: jax.Array) -> jax.Array:
        """Weighted mean `sum(w * nll) / sum(w)`, a scalar; the loss to train on is `energy`.

        Args:
            targets: `[N]`, as of `nll`; any value where the weight is 0.
        """
        # masked at the inputs: the value of padding has no gradient, NaN included
        log_psi = _common.mask_out(self.log_psi, weights=self.weights, fill=0)
        targets = _common.mask_out(targets, weights=self.weights, fill=0)
        nll = dataclasses.replace(self, log_psi=log_psi).nll(targets)
        return _common.weighted_mean(nll, weights=self.weights)

    def kl(self, other: Any) -> jax.Array:
        """Refuses: there is no closed form.

        Raises:
            TypeError: always; the message says how to estimate it.
        """
        raise _common.no_closed_form(self)

    def sample(self, key: jax.Array) -> jax.Array:
        """Draws a random sign for every walker, for a complex amplitude `+-1 +- i`.

        Scores with such signs have the metric for second moment: walkers do not mix.
        """
        # a sign for the amplitude and one for the phase
        shape = (self.num_columns, *self.batch_shape)
        dtype = _common.widen(self.natural[0]).dtype
        signs = jax.random.rademacher(key, shape, dtype)
        if len(signs) == 1:
            return signs[0]
        return jax.lax.complex(signs[0], signs[1])

    def fisher_sqrt_column(self, c: int | jax.Array) -> tuple[jax.Array, ...]:
        """Column `c` of `S`, before centring: 2 in one of the real arrays.

        Args:
            c: Column number in `[0, num_columns)`; may be traced.

        Returns:
            Like `natural`.
        """
        # S is 2 on its diagonal, so that S S^T = 4 I
        columns = []
        for i, x in enumerate(self.natural):
            two, zero = jnp.full_like(x, 2), jnp.zeros_like(x)
            columns.append(jnp.where(c == i, two, zero))
        return tuple(columns)

    def hessian_product(self, v: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """`4 v`, term by term, unweighted and before centring.

        Args:
            v: Like `natural`.
        """
        pairs = zip(self.natural, v, strict=True)
        return tuple((4 * u).astype(x.dtype) for x, u in pairs)

    def _mean(self, x: jax.Array) -> jax.Array:
        # a batch of padding alone has the mean zero, not 0 / 0
        w = self.weights
        if w is None:
            w = jnp.ones(self.batch_shape, x.real.dtype)
        total = jnp.sum(w)
        mean = jnp.sum(w * x) / jnp.where(total != 0, total, 1)
        return jnp.where(total != 0, mean, 0)


def _part(take: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    # the estimators look at shapes before there are arrays
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.eval_shape(take, x)
    return take(x)


def _real_product(x: jax.Array, y: jax.Array) -> jax.Array:
    """`Re(conj(x) y)`."""
    return x.real * y.real + x.imag * y.imag
