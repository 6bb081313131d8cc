"""Predictive distributions: what a model's `predict` returns instead of a loss."""

from kfac_optax.likelihoods._common import is_likelihood
from kfac_optax.likelihoods.bernoulli import Bernoulli
from kfac_optax.likelihoods.categorical import Categorical
from kfac_optax.likelihoods.normal import Normal

__all__ = ["Bernoulli", "Categorical", "Normal", "is_likelihood"]
