"""Every supported linen layer gives its own gradient back; what is not supported says why."""

import flax.linen as nn
import jax.numpy as jnp
import pytest

import kfac_optax as ko
from tests import oracles
from tests.layers.gradients import assert_gradients, squares, x64_params

CONVS = {
    "same": dict(features=3, kernel_size=(3, 2)),
    "valid_stride": dict(features=2, kernel_size=(2, 3), strides=(2, 1), padding="VALID"),
    "dilated": dict(
        features=2, kernel_size=(2, 2), kernel_dilation=(2, 1), padding=((1, 0), (0, 2))
    ),
    "input_dilated": dict(
        features=2, kernel_size=(3, 3), input_dilation=(2, 1), padding=((1, 2), (0, 1))
    ),
    "groups": dict(features=6, kernel_size=(2, 2), feature_group_count=2),
    "depthwise": dict(features=8, kernel_size=(3, 3), feature_group_count=4, strides=2),
    "circular": dict(features=2, kernel_size=(3, 3), padding="CIRCULAR"),
    "reflect": dict(features=2, kernel_size=(3, 3), padding="REFLECT", use_bias=False),
    "pointwise": dict(features=2, kernel_size=(1, 1)),
}
TRANSPOSED = {
    "up": dict(features=2, kernel_size=(3, 2), strides=(2, 2)),
    "up_valid": dict(
        features=2, kernel_size=(2, 2), strides=(2, 3), padding="VALID", use_bias=False
    ),
    "up_dilated": dict(features=2, kernel_size=(2, 3), strides=(1, 2), kernel_dilation=(2, 1)),
    "up_flipped": dict(features=3, kernel_size=(3, 2), strides=(2, 1), transpose_kernel=True),
    "up_explicit": dict(features=2, kernel_size=(2, 2), strides=(2, 2), padding=((1, 0), (2, 1))),
    "up_round": dict(features=2, kernel_size=(3, 2), strides=(2, 3), padding="CIRCULAR"),
}


def flat(x):
    return x.reshape(len(x), -1)


class Maps(nn.Module):
    @nn.compact
    def __call__(self, x):
        outs = [flat(nn.Conv(**kw, name=name)(x)) for name, kw in CONVS.items()]
        outs += [flat(nn.ConvTranspose(**kw, name=name)(x)) for name, kw in TRANSPOSED.items()]
        return jnp.concatenate(outs, 1)


class OneAndThree(nn.Module):
    @nn.compact
    def __call__(self, x, volume, maps):
        outs = [nn.Conv(2, 3, padding="CAUSAL", kernel_dilation=2, name="causal")(x)]
        outs += [
            nn.Conv(2, 3, strides=2, name="line")(x),
            nn.ConvTranspose(2, (3,), strides=(2,), name="up")(x),
        ]
        outs += [nn.Conv(2, (2, 3, 2), strides=(1, 2, 1), name="volume")(volume)]
        outs += [nn.Conv(2, (2, 2), name="batched")(maps)]  # two batch axes
        local = dict(strides=2, padding=((2, 0),), input_dilation=2, kernel_dilation=2)
        outs += [nn.ConvLocal(2, 2, **local, name="local")(x)]  # a kernel for every position
        outs += [nn.ConvLocal(2, (2, 2), use_bias=False, name="batched_local")(maps)]
        return jnp.concatenate(list(map(flat, outs)), 1)


class Products(nn.Module):
    @nn.compact
    def __call__(self, x):  # [N, T, 4]
        outs = [nn.DenseGeneral((2, 3), name="heads")(x)]
        outs += [nn.DenseGeneral(5, axis=(-2, -1), name="two_axes")(x)]
        outs += [nn.DenseGeneral((2, 2), axis=1, use_bias=False, name="middle")(x)]
        outs += [nn.Einsum((4, 2, 3), "ntd,dhk->nthk", use_bias=True, name="einsum")(x)]
        outs += [nn.Einsum((3, 4, 2), "...td,tdk->...tk", use_bias=True, name="grouped")(x)]
        outs += [nn.Einsum((3, 4), "ntd,kd->nkt", use_bias=False, name="turned")(x)]
        return jnp.concatenate(list(map(flat, outs)), 1)


class Norms(nn.Module):
    @nn.compact
    def __call__(self, x):  # [N, 3, 2, 4]
        outs = [
            nn.BatchNorm(use_running_average=False, name="batch")(x),
            nn.LayerNorm(name="layer")(x),
        ]
        outs += [nn.BatchNorm(use_running_average=True, axis=1, name="frozen")(x)]
        outs += [nn.LayerNorm(feature_axes=(-2, -1), reduction_axes=(1, 2, 3), name="two_axes")(x)]
        outs += [
            nn.RMSNorm(name="rms")(x),
            nn.GroupNorm(2, name="group")(x),
            nn.InstanceNorm(name="instance")(x),
        ]
        outs += [
            nn.LayerNorm(use_scale=False, name="shift")(x),
            nn.LayerNorm(use_bias=False, name="scale")(x),
        ]
        return jnp.concatenate([flat(jnp.sin(y)) for y in outs], 1)


class Transformer(nn.Module):
    """One block of everything a language model has; the table is also the head."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(7, 4, name="embed")
        x = embed(tokens) + self.param("positions", nn.initializers.normal(), (tokens.shape[1], 4))
        mask = nn.make_causal_mask(tokens)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(
            nn.LayerNorm(name="norm")(x), mask=mask
        )
        x = x + nn.Dense(4, name="out")(nn.gelu(nn.Dense(6, name="up")(x)))
        return embed.attend(x)


def problem(model, *args, **variables):
    params = x64_params(lambda key, *a: model.init(key, *a)["params"], *args)

    def losses(params, *args):
        outputs = model.apply({"params": params, **variables}, *args, mutable=["batch_stats"])[0]
        return squares(outputs)

    return losses, params, *args


def test_convolutions_of_two_dimensions(x64):
    layers = assert_gradients(*problem(Maps(), oracles.normal(0, (3, 5, 4, 4))))
    shapes = {x.path: (x.groups, x.inputs, x.outputs) for x in layers}
    assert (
        shapes["groups"] == (2, 8, 3)
        and shapes["depthwise"] == (4, 9, 2)
        and shapes["up_flipped"] == (1, 24, 3)
    )
    assert {x.kind for x in layers} == {"conv"}


def test_convolutions_of_one_and_three_dimensions_and_several_batch_axes(x64):
    args = (
        oracles.normal(0, (2, 6, 3)),
        oracles.normal(1, (2, 3, 4, 3, 2)),
        oracles.normal(2, (2, 3, 4, 3, 2)),
    )
    assert_gradients(*problem(OneAndThree(), *args))


def test_dense_general_and_einsum(x64):
    layers = assert_gradients(*problem(Products(), oracles.normal(0, (2, 3, 4))))
    shapes = {x.path: (x.kind, x.groups, x.inputs, x.outputs) for x in layers}
    assert shapes["heads"] == ("einsum", 1, 4, 6) and shapes["grouped"] == ("einsum", 3, 4, 2)
    assert shapes["two_axes"] == ("einsum", 1, 12, 5) and shapes["turned"] == ("einsum", 1, 4, 3)


def test_normalisation_layers(x64):
    statistics = {"frozen": {"mean": jnp.full(3, 0.3), "var": jnp.full(3, 1.7)}}
    statistics["batch"] = {"mean": jnp.zeros(4), "var": jnp.ones(4)}
    layers = assert_gradients(
        *problem(Norms(), oracles.normal(0, (3, 3, 2, 4)), batch_stats=statistics)
    )
    assert {x.kind for x in layers} == {"scale_shift"} and len(layers) == 9


def test_a_transformer_with_a_tied_table(x64):
    tokens = jnp.asarray([[0, 3, 3], [6, 1, 0]])
    layers = assert_gradients(*problem(Transformer(), tokens))
    kinds = {x.path: x.kind for x in layers}
    assert (
        kinds["embed"] == "tied_embedding"
        and kinds["attention/out"] == "einsum"
        and kinds["norm"] == kinds["positions"] == "scale_shift"
    )


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.OptimizedLSTMCell, nn.GRUCell])
def test_recurrent_cells(x64, cell):
    model = nn.RNN(cell(3, param_dtype=jnp.float64), name="rnn")
    layers = assert_gradients(*problem(model, oracles.normal(0, (2, 4, 2))))
    assert {x.uses for x in layers} == {4}


def test_what_is_not_supported_says_why(x64):
    class Odd(nn.Module):
        @nn.compact
        def __call__(self, x):
            outs = [nn.Dense(2, name="fine")(x)]
            outs += [nn.Conv(2, (2,), mask=jnp.ones((2, 4, 2)), name="masked")(x)]
            outs += [nn.Einsum((3, 4), "ntd,td->nt", use_bias=False, name="scaled")(x)]
            shared = self.param("shared", nn.initializers.normal(), (4, 4))
            tokens = jnp.asarray([[0, 1], [2, 2]])
            outs += [
                ko.tap_dense(x @ shared, x, shared),
                ko.tap_embedding(shared[tokens], tokens, shared),
            ]
            partly = self.param("partly", nn.initializers.normal(), (4, 4))
            outs += [ko.tap_dense(x @ partly, x, partly), jnp.sin(partly)[:2]]
            return jnp.concatenate(list(map(flat, outs)), 1)

    losses, params, x = problem(Odd(), oracles.normal(0, (2, 3, 4)))
    layers = ko.empirical_fisher(losses).layers(params, x)
    reasons = {u.path: u.reason for u in layers.uncovered}
    assert {x.path: x.notes for x in layers} == {
        "fine": (),
        "partly": ("partly also used by sin: not measured",),
    }
    assert reasons["shared"] == "layers of different kinds share it"
    assert (
        reasons["masked/kernel"]
        == reasons["masked/bias"]
        == "not supported: its weights are masked, and not by a staircase of constants"
    )
    assert reasons["scaled/kernel"] == "not supported: einsum 'ntd,td->nt' is no matrix product"
    table = str(layers)
    assert "not supported: its weights are masked, and not by a staircase of constants" in table
    with pytest.raises(ValueError, match="is no matrix product"):
        ko.kfac(layers, learning_rate=0.1, uncovered="raise")
