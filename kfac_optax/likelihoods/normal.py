"""Independent Gaussian outputs: regression."""

import dataclasses
import functools
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kfac_optax.likelihoods import _common


@jax.tree_util.register_static
class _KnownScale(float):
    """A number that is structure, not a leaf.

    Were `jit` or `vmap` to turn it into an array, it would get the Fisher directions of a learned
    scale.
    """


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["mean", "scale", "weights"],
    meta_fields=["event_ndim"],
    drop_fields=["batch_ndim"],  # follows from event_ndim and the shape; stale after vmap
)
@dataclasses.dataclass(frozen=True)
class Normal:
    """Independent normal outputs, given by mean and standard deviation.

    `nll = sum_event [(t - m)^2 / (2 s^2) + log s + log(2 pi) / 2]`. The Fisher is
    `diag(1 / s^2)` in the mean; for a learned scale also `diag(2 / s^2)` in the scale, so
    `S = diag(1 / s, sqrt(2) / s)`. In the scale it is the expected Hessian, not the Hessian.

    Args:
        mean: `[*batch, *event]`.
        scale: A Python or NumPy number: known noise, no Fisher directions, static under `jit`.
            An array: an output of the model, broadcast to the shape of the mean. (A known array
            is right too, its directions have zero Jacobian, but doubles the columns.)
        weights: Non-negative term weights or a 0/1 mask, `[*batch]`; None means all ones.
        batch_ndim: Number of leading axes that are the batch; the nll sums over the rest.
        event_ndim: The same from the other end (trailing axes); wins over `batch_ndim` if given.
            This is what `vmap` keeps: inside a per-example function write `batch_ndim=0`.

    Raises:
        ValueError: `weights` has another shape than the batch, `scale` does not broadcast to the
            mean or is a number that is not positive and finite, or `batch_ndim` does not fit.
        TypeError: complex numbers.

    Reference: Martens (2020), "New Insights and Perspectives on the Natural Gradient Method".

    >>> likelihood = Normal(jnp.zeros([1, 2]), scale=2.0)
    >>> print(likelihood.hessian_product((jnp.ones([1, 2]),))[0], likelihood.scale)
    [[0.25 0.25]] 2.0
    """

    mean: jax.Array
    scale: float | jax.Array = 1.0
    weights: jax.Array | None = None
    batch_ndim: int = 1
    event_ndim: int | None = None

    def __post_init__(self) -> None:
        _common.check_real("Normal", mean=self.mean, scale=self.scale)
        # fields of a frozen dataclass, set once
        batch_ndim, event_ndim = _common.split_axes(
            "Normal", array=self.mean, batch_ndim=self.batch_ndim, event_ndim=self.event_ndim
        )
        object.__setattr__(self, "batch_ndim", batch_ndim)
        object.__setattr__(self, "event_ndim", event_ndim)
        if _common.has_shape(self.mean):
            scale = _settle_scale(self.scale, shape=self.mean.shape)
            object.__setattr__(self, "scale", scale)
            _common.check_weights(
                "Normal",
                weights=self.weights,
                batch_shape=self.batch_shape,
                advice="batch_ndim sets how many leading axes are the batch.",
            )

    @property
    def natural(self) -> tuple[jax.Array, ...]:
        """The arrays that the Fisher differentiates: `(mean,)` or `(mean, scale)`."""
        if isinstance(self.scale, float):
            return (self.mean,)
        return (self.mean, self.scale)

    def with_natural(self, natural: tuple[jax.Array, ...]) -> "Normal":
        """Returns the same likelihood at another mean (and scale, if that is learned)."""
        # a known scale is no natural array
        names = ("mean", "scale")[: len(self.natural)]
        named = dict(zip(names, natural, strict=True))
        return dataclasses.replace(self, **named)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Shape of the terms: the leading `batch_ndim` axes."""
        return self.mean.shape[: self.batch_ndim]

    @property
    def num_columns(self) -> int:
        """Number of columns of `S`: the event size, twice that for a learned scale."""
        event = self.mean.shape[self.batch_ndim :]
        return len(self.natural) * math.prod(event)

    def nll(self, targets: jax.Array) -> jax.Array:
        """Negative log-likelihood per term, constants included, summed over the event axes.

        Args:
            targets: `[*batch, *event]`.

        Returns:
            `[*batch]`, float32 or wider, unweighted.

        Raises:
            ValueError: `targets` has another shape than the mean.
        """
        _common.check_targets("Normal", targets=targets, shape=self.mean.shape)
        scale = self._wide_scale()
        # (t - m) / s, before squares that might overflow
        z = (_common.widen(targets) - _common.widen(self.mean)) / scale
        log = math.log if isinstance(scale, float) else jnp.log
        constant = 0.5 * math.log(2 * math.pi)
        terms = 0.5 * z**2 + (log(scale) + constant)
        return _common.event_sum(terms, batch_ndim=self.batch_ndim)

    def mean_nll(self, targets: jax.Array) -> jax.Array:
        """Weighted mean `sum(w * nll) / sum(w)`, a scalar; 0 where all weights are 0.

        Args:
            targets: `[*batch, *event]`; any value where the weight is 0.
        """
        # The scale is filled with 1: a zero would bring back the NaN that masking keeps out.
        fills = (0.0, 1.0)[: len(self.natural)]
        natural = tuple(
            _common.mask_out(x, weights=self.weights, fill=fill)
            for x, fill in zip(self.natural, fills, strict=True)
        )
        targets = _common.mask_out(targets, weights=self.weights, fill=0.0)
        nll = self.with_natural(natural).nll(targets)
        return _common.weighted_mean(nll, weights=self.weights)

    def kl(self, other: "Normal") -> jax.Array:
        """Divergence `KL(self || other)` of every term, summed over the event axes, unweighted.

        `sum_event [log(s' / s) + (s^2 + (m - m')^2) / (2 s'^2) - 1/2]`. Its Hessian in the natural
        arrays of either is the Fisher where the two agree.

        Args:
            other: A prediction of the same terms; its scale may be known or learned.

        Returns:
            `[*batch]`, float32 or wider.

        Raises:
            TypeError: `other` is of another kind.
            ValueError: `other` has another shape.

        >>> print(Normal(jnp.zeros([1, 2])).kl(Normal(jnp.ones([1, 2]))))
        [1.]
        """
        _common.check_other(self, other)
        mean, mean_other = _common.widen(self.mean), _common.widen(other.mean)
        scale, scale_other = self._wide_scale(), other._wide_scale()
        ratio = jnp.asarray(scale / scale_other)
        distance = (mean - mean_other) / scale_other
        terms = 0.5 * (ratio**2 + distance**2 - 1) - jnp.log(ratio)
        return _common.event_sum(terms, batch_ndim=self.batch_ndim)

    def sample(self, key: jax.Array) -> jax.Array:
        """Draws targets `[*batch, *event]` from the model, float32 or wider.

        Rounded to bfloat16, their distance to the mean would not have the right variance. A sample
        is a label, so it is constant under differentiation: through `m + s * noise` the gradient of
        `nll(sample)` in the mean would vanish.
        """
        mean = _common.widen(self.mean)
        noise = jax.random.normal(key, mean.shape, mean.dtype)
        return jax.lax.stop_gradient(mean + self._wide_scale() * noise)

    def fisher_sqrt_column(self, c: int | jax.Array) -> tuple[jax.Array, ...]:
        """Column `c` of `S` for every term: `e_c / s`, then `sqrt(2) e_c / s` in the scale.

        Args:
            c: Column number in `[0, num_columns)`, row-major over the event, first the mean's
                columns, then the scale's; may be traced.

        Returns:
            Like `natural`, each `[*batch, *event]` in the dtype of that array.
        """
        # one column after another: those of the mean, then those of the scale
        event = self.mean.shape[self.batch_ndim :]
        hits = _common.unit(c, shape=(len(self.natural), *event))
        # 1 / s in the mean, sqrt(2) / s in the scale
        columns = []
        for x, hit, root in zip(self.natural, hits, self._roots(), strict=True):
            zeros = jnp.zeros_like(_common.widen(x))
            column = jnp.where(hit, root / self._wide_scale(), zeros)
            columns.append(column.astype(x.dtype))
        return tuple(columns)

    def hessian_product(self, v: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Fisher times `v`, term by term and unweighted: `(v_m / s^2, 2 v_s / s^2)`.

        Args:
            v: Like `natural`, each `[*batch, *event]`.

        Returns:
            Like `natural`, each `[*batch, *event]` in the dtype of that array.
        """
        products = []
        for x, u, root in zip(self.natural, v, self._roots(), strict=True):
            fisher = (root / self._wide_scale()) ** 2
            product = fisher * _common.widen(u)
            products.append(product.astype(x.dtype))
        return tuple(products)

    def _roots(self) -> tuple[float, ...]:
        """Numerators of `S`: 1 in the mean, sqrt(2) in the scale."""
        return (1.0, math.sqrt(2))[: len(self.natural)]

    def _wide_scale(self) -> float | jax.Array:
        # A plain float is weakly typed: it takes the precision of what it meets.
        if isinstance(self.scale, float):
            return float(self.scale)
        return _common.widen(self.scale)


def _settle_scale(scale: Any, *, shape: tuple[int, ...]) -> Any:
    """Marks a number as known; broadcasts an array to `shape`; leaves placeholders alone."""
    # known noise is structure: it has no directions in the Fisher
    if isinstance(scale, numbers.Real):
        number = float(scale)
        if not 0 < number < math.inf:
            raise ValueError(
                f"Normal: scale is {scale}, expected a positive finite standard deviation. "
                f"For a learned scale pass an array, for instance jax.nn.softplus(output)."
            )
        return _KnownScale(number)
    # placeholders of pytree code stay as they are
    if not isinstance(scale, jax.Array | np.ndarray) or scale.shape == shape:
        return scale
    try:
        return jnp.broadcast_to(scale, shape)
    except ValueError as error:
        raise ValueError(
            f"Normal: scale has shape {scale.shape}, expected one that broadcasts to the mean's "
            f"{shape}. Pass a number, or one standard deviation per output."
        ) from error
