"""A Gaussian over the parameters of a trained model, and what it says about data."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from kfac_optax._parts import boxes_left, size_of
from kfac_optax._tree import (
    inner,
    named_leaves,
    replace_leaves,
)
from kfac_optax._types import Bucket, PyTree
from kfac_optax._validate import check_number
from kfac_optax.bayes.draw import draw
from kfac_optax.bayes.measure import Measured, factorize
from kfac_optax.bayes.outputs import Outputs, averaged, linearized
from kfac_optax.engine.block_inverse import (
    BlockInverse,
    covered_names,
    covered_only,
    layers_of,
    logdet,
    solve_tree,
)
from kfac_optax.estimators.curvature import Spec
from kfac_optax.estimators.heads import split_outputs

_GRID = 17  # points of one round of the search for a prior precision
_ROUNDS = 7  # each narrows the bracket to an eighth


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Posterior:
    """Gaussian `N(mean, (size F + prior_precision I)^{-1})` over the parameters; made by `laplace`.

    `F` is the block-diagonal curvature, damped as its blocks do it: with the damping
    `prior_precision / size`, exactly in an eigenbasis, factored for `kronecker("cholesky")` and
    `low_rank`. Parameters without a block are fixed at their mean. A tree of arrays, so that it
    passes through `jit`.

    Attributes:
      mean: the parameters.
      measured: statistics of the data.
      inverses: what the blocks have made of them, by bucket.
      prior_precision: of the Gaussian prior `N(0, I / prior_precision)`.
      buckets: layers and their blocks.
      spec: of the estimator.
    """

    mean: PyTree
    measured: Measured
    inverses: dict[str, PyTree]
    prior_precision: jax.Array
    buckets: tuple[Bucket, ...] = dataclasses.field(metadata={"static": True})
    spec: Spec = dataclasses.field(metadata={"static": True})

    @property
    def size(self) -> jax.Array:
        """Number of examples, or the sum of their weights."""
        return self.measured.size

    @property
    def _operator(self) -> BlockInverse:
        return BlockInverse(self.buckets, self.inverses, self.prior_precision / self.size)

    def inverse_product(self, vector: PyTree) -> PyTree:
        """`(F + (prior_precision / size) I)^{-1} v`, the inverse curvature of the mean objective;
        zero where no block is.
        """
        # a block-diagonal solve; what no block covers is fixed, so it is zero
        zeros = jax.tree.map(jnp.zeros_like, vector)
        solved = named_leaves(solve_tree(self._operator, vector))
        return replace_leaves(zeros, covered_only(self._operator, solved))

    def covariance_product(self, vector: PyTree) -> PyTree:
        """Covariance times a tree like the parameters, zero where no block is."""
        # (N F + prior I)^{-1} = (F + prior / N I)^{-1} / N
        solved = self.inverse_product(vector)
        return jax.tree.map(lambda x: (x / self.size).astype(x.dtype), solved)

    def sample(self, key: jax.Array, count: int = 1) -> PyTree:
        """Parameters drawn from the posterior, `count` of them on a new axis 0.

        Raises:
          ValueError: a block has no square root.
        """
        where, variance = "Posterior.sample", 1 / self.size
        return draw(where, self._operator, self.mean, key, count, variance)

    def outputs(self, *args: PyTree, batch_size: int = 32) -> Outputs:
        """Gaussian over the outputs of the model linearised at the mean, `N(f, J Sigma J^T)`.

        Costs a backward pass and a solve for every output of every example.

        Args:
          *args: further arguments of `predict`, as of the batches: examples on axis 0.
          batch_size: examples at the same time, in memory `batch_size * outputs` gradients.

        Returns:
          `Outputs(mean [N, *event], covariance [N, C, C])`; the outputs are the first natural array
          of the likelihood (logits, or the mean).

        Raises:
          TypeError: the estimator knows losses only, or several likelihoods.

        Reference: Immer, Korzepa & Bauer, Improving predictions of Bayesian neural nets via local
          linearization (2021).
        """
        # the first natural array as function of the parameters
        names = covered_names(self._operator)

        def first(params: PyTree, *args: PyTree) -> jax.Array:
            return self._head(params, args).natural[0]

        return linearized(first, self.mean, names, self.covariance_product, args, batch_size)

    def predict(
        self,
        *args: PyTree,
        approximation: str = "probit",
        key: jax.Array | None = None,
        samples: int = 100,
        batch_size: int = 32,
    ) -> Any:
        """Predictive distribution of the linearised model, a likelihood as `predict` returns it.

        With `N(f, S)` the outputs: `Normal` keeps its form, the variance is its own plus that of
        the output (exact). Logits become `f_c / sqrt(1 + pi S_cc / 8)` (`"probit"`, MacKay's
        approximation, for several classes one by one), or those of the mean of the probabilities
        over draws from `N(f, S)` (`"sample"`).

        Args:
          *args: further arguments of `predict`.
          approximation: `"probit"` or `"sample"`.
          key: of draws.
          samples: how many.
          batch_size: as for `outputs`.

        Raises:
          TypeError: as `outputs`; another likelihood than `Normal`, `Categorical`, `Bernoulli`.
          ValueError: an unknown word, or no key to draw with.

        Reference: MacKay, The evidence framework applied to classification networks (1992).
        """
        outputs = self.outputs(*args, batch_size=batch_size)
        head = self._head(self.mean, args)
        return averaged(head, outputs, approximation, key, samples)

    def log_evidence(self, loss: Any) -> jax.Array:
        """Laplace's approximation of the log marginal likelihood of the data.

        With `P` parameters it is

            -size loss - prior_precision |mean|^2 / 2 + P log(prior_precision) / 2
            - log det(size F + prior_precision I) / 2.

        Exact where the model is linear and its noise Gaussian.

        Args:
          loss: mean negative log-likelihood of the training data at the mean.

        Raises:
          ValueError: a block has no determinant.

        Reference: MacKay, A practical Bayesian framework for backpropagation networks (1992).
        """
        # log det(N F + prior I) = P log N + log det(F + prior / N I)
        leaves = named_leaves(self.mean)
        random = covered_only(self._operator, leaves)
        fixed = sum(map(size_of, boxes_left(layers_of(self._operator)).values()))
        count = sum(x.size for x in random.values()) - fixed
        square = self.prior_precision * inner(random, random)
        prior = count * jnp.log(self.prior_precision) - square
        determinant = logdet("Posterior.log_evidence", self._operator)
        curvature = count * jnp.log(self.size) + determinant
        return -self.size * loss + (prior - curvature) / 2

    def with_prior_precision(self, prior_precision: Any) -> "Posterior":
        """The posterior with another prior; the mean and the statistics stay."""
        check_number("Posterior", "prior_precision", prior_precision, above=0)
        precision = jnp.asarray(prior_precision, self.prior_precision.dtype)
        # another damping: the statistics are factorised anew
        inverses = factorize(self.buckets, self.measured, precision / self.size)
        return dataclasses.replace(self, prior_precision=precision, inverses=inverses)

    def with_best_prior_precision(self, low: float = 1e-6, high: float = 1e6) -> "Posterior":
        """The posterior with the prior precision that maximises `log_evidence` between two bounds.

        Grids on the logarithm, each around the best point of the one before. Where the evidence
        goes on rising towards a bound, it is that bound.
        """
        check_number("Posterior.with_best_prior_precision", "low", low, above=0)
        check_number("Posterior.with_best_prior_precision", "high", high, above=low)
        # the evidence is a smooth function of the logarithm
        dtype = self.prior_precision.dtype
        left = jnp.asarray(math.log(low), dtype)
        right = jnp.asarray(math.log(high), dtype)
        for _ in range(_ROUNDS):
            left, right = _narrowed(self, left, right)
        return self.with_prior_precision(jnp.exp((left + right) / 2))

    def _head(
        self,
        params: PyTree,
        args: tuple[PyTree, ...],
    ) -> Any:
        """The only likelihood of the model."""
        advice = "Make the posterior from ggn(predict) or fisher(predict)."
        if self.spec.kind.losses:  # of all examples together, so that it is not even called
            raise TypeError(
                f"Posterior: {self.spec.kind.name} knows losses only; expected one likelihood. {advice}"
            )
        # one likelihood, whose first natural array is the output
        prediction = self.spec.function(params, *args)
        _, heads = split_outputs(self.spec.kind, prediction)
        if len(heads) != 1:
            raise TypeError(
                f"Posterior: the model predicts {len(heads)} likelihoods; expected one. {advice}"
            )
        return heads[0]


@jax.jit
def _narrowed(
    posterior: Posterior,
    left: jax.Array,
    right: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The grid's neighbours of its best point."""
    # the loss does not depend on the prior: any number will do
    grid = jnp.linspace(left, right, _GRID)

    def evidence(log_precision: jax.Array) -> jax.Array:
        other = posterior.with_prior_precision(jnp.exp(log_precision))
        return other.log_evidence(0.0)

    best = jnp.argmax(jax.vmap(evidence)(grid))
    before = jnp.maximum(best - 1, 0)
    after = jnp.minimum(best + 1, _GRID - 1)
    return grid[before], grid[after]
