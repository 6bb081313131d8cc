"""Predictive distributions: what a model's `predict` returns instead of a loss."""

from kfac_optax.likelihoods.bernoulli import Bernoulli
from kfac_optax.likelihoods.categorical import Categorical
from kfac_optax.likelihoods.log_amplitude import LogAmplitude
from kfac_optax.likelihoods.log_density import from_log_density
from kfac_optax.likelihoods.normal import Normal
from kfac_optax.likelihoods.protocol import (
    Likelihood,
    check_members,
    check_shapes,
    is_likelihood,
)

__all__ = [
    "Bernoulli",
    "Categorical",
    "Likelihood",
    "LogAmplitude",
    "Normal",
    "check_members",
    "check_shapes",
    "from_log_density",
    "is_likelihood",
]
