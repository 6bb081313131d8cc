"""Haiku's own networks: every parameter has a layer. Traced only; the smaller zoo is computed."""

import jax
import jax.numpy as jnp
import pytest

import kfac_optax as ko

pytestmark = pytest.mark.slow


def conv_lstm(hk, x):
    core = hk.Conv2DLSTM((4, 4), 3, 3)
    return hk.dynamic_unroll(core, x, core.initial_state(len(x)), time_major=False)[0]


IMAGES = (2, 32, 32, 3)
NETS = {
    "resnet 18": (lambda hk, x: hk.nets.ResNet18(10)(x, True), IMAGES),
    "resnet 50, version 2": (lambda hk, x: hk.nets.ResNet50(10, resnet_v2=True)(x, True), IMAGES),
    "mobilenet": (lambda hk, x: hk.nets.MobileNetV1(num_classes=10)(x, True), IMAGES),
    "convolutional lstm": (conv_lstm, (2, 3, 4, 4, 2)),
}


@pytest.mark.parametrize("name", NETS)
def test_every_parameter_has_a_layer(name):
    hk = pytest.importorskip("haiku")
    network, shape = NETS[name]
    transformed = hk.transform_with_state(lambda x: network(hk, x))
    x = jnp.ones(shape)
    # shapes are all that finding layers takes
    params, state = jax.eval_shape(transformed.init, jax.random.key(0), x)
    params, state = jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), (params, state))

    def predict(p, x):
        out, _ = transformed.apply(p, state, None, x)
        return ko.Normal(out.reshape(len(x), -1))

    layers = ko.ggn(predict).layers(params, x)
    assert not layers.uncovered, str(layers)
    assert not any(layer.partly for layer in layers)
