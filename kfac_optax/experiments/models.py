"""Flax models by name, with or without batch statistics."""

from collections.abc import Callable
from typing import Any

import jax
import ml_collections
from flax import linen as nn

from kfac_optax.experiments import data
from kfac_optax.experiments.nets_conv import VGG16, ResNet, SmallCNN
from kfac_optax.experiments.nets_dense import MLP, Autoencoder, LinearMLP
from kfac_optax.experiments.nets_rows import RMSTransformer, RowLSTM
from kfac_optax.experiments.nets_text import CharTransformer

# by the word in the configuration
MODELS: dict[str, Callable[..., nn.Module]] = {
    "linear_mlp": LinearMLP,
    "mlp": MLP,
    "autoencoder": Autoencoder,
    "small_cnn": SmallCNN,
    "vgg16": VGG16,
    "resnet": ResNet,
    "char_transformer": CharTransformer,
    "rms_transformer": RMSTransformer,
    "lstm": RowLSTM,
}


def build(config: ml_collections.ConfigDict, *, outputs: int) -> nn.Module:
    """Builds the model that `config.name` names; the other entries are its attributes.

    Args:
        config: the `model` section of an experiment.
        outputs: number of logits, unless the section has an entry of that name.

    Returns:
        A module that is called as `module(x, train=...)`.

    Raises:
        ValueError: the name is unknown.
    """
    options = {"outputs": outputs, **config.to_dict()}
    return data.select(MODELS, options.pop("name"), "config.model.name")(**options)


def init(model: nn.Module, key: jax.Array, x: jax.Array) -> tuple[Any, Any]:
    """Initial parameters, and the other variables (`{}` for a model without batch statistics)."""
    # in train mode, so that batch statistics are made
    variables = dict(model.init(key, x, train=True))
    return variables.pop("params"), variables


def apply(
    model: nn.Module, params: Any, model_state: Any, x: jax.Array, *, train: bool
) -> tuple[Any, Any]:
    """Logits, and the variables besides the parameters as the call leaves them."""
    variables = {"params": params, **model_state}
    # models with batch statistics hand back the new ones
    if train and model_state:
        return model.apply(variables, x, train=True, mutable=list(model_state))
    return model.apply(variables, x, train=train), model_state
