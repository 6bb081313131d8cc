"""Every configuration trains at a reduced size, and a run of it that was interrupted ends in the
same numbers.
"""

import itertools
import pickle
import re

import jax
import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from kfac_optax.experiments import models, results, settings, sweep, train
from kfac_optax.experiments.checkpoints import Store
from kfac_optax.experiments.results import Job
from tests.experiments import data_files
from tests.experiments.conftest import CONFIGS, read_config


def reduced(name: str, directory, *variant: str):
    config = read_config(name, *variant)
    config.update(epochs=2, batch_size=8, steps_per_call=1, evaluation_batch=2)
    if "per_optimizer" in config:
        del config.per_optimizer
    config.data.update(train=20, test=4)
    if config.data.name == "cifar10":
        data_files.write_cifar10(directory, pickled=False)
        config.data_dir = str(directory)
        config.data.per_file = 4
    if config.data.name == "fashion_mnist":
        data_files.write_idx(directory)
        config.data_dir = str(directory)
    config.kfac = config.kfac.to_dict() | {"curvature_every": 1, "inverse_every": 2}
    if "low_rank" in config:
        config.low_rank = config.low_rank.to_dict() | {"rank": 4}
    if "adaptive" in config:
        config.adaptive = {"curvature_every": 1, "inverse_every": 2, "adapt_every": 3}
    if "report_every" in config:
        config.update(report_every=0, budget_seconds=0.0)
    return config


# Widths and optimizers that compile quickly.
SMALL = [
    ("resnet110_cifar10", "sgd", {"depth": 8}),
    ("vgg16_cifar10", "b_kfac", {"width": 8, "groups": (1,), "pooled": 1, "hidden": (4,)}),
    (
        "vgg16_cifar10:fashion_mnist",
        "rs_kfac",
        {"width": 8, "groups": (1,), "pooled": 1, "hidden": (4,)},
    ),
    ("wide_mlp", "b_kfac_two_level", {"widths": (40,)}),
    ("fashion_mnist_cnn", "adam", {"channels": (8,), "hidden": (4,)}),
    ("fashion_mnist_autoencoder", "sgd", {"widths": (6, 3)}),
    ("fashion_mnist_autoencoder:digits", "kfac", {"widths": (6, 3)}),
    ("fashion_mnist_autoencoder:digits", "two_level_adaptive", {"widths": (6, 3)}),
    ("char_transformer", "adam", {"depth": 1, "width": 8, "heads": 2}),
    ("deep_tanh", "kfac", {"widths": (4, 4)}),
    ("deep_tanh", "smw", {"widths": (4, 4)}),
    ("uncovered:deep_linear", "adam", {"depth": 2, "width": 4}),
    ("uncovered:resnet", "adam", {}),
    ("uncovered:rms_transformer", "kfac", {"depth": 1, "width": 8, "heads": 2}),
    ("uncovered:lstm", "kfac", {"width": 4}),
]


@pytest.mark.parametrize(("name", "optimizer", "model"), SMALL)
def test_a_reduced_configuration_trains_and_resumes_to_the_same_numbers(
    name, optimizer, model, tmp_path
):
    config = reduced(*name.split(":")[:1], tmp_path, *name.split(":")[1:])
    config.model.update(model)
    if name == "char_transformer":
        config.data.context = 8
    if optimizer == "kfac":
        config.kfac = {
            **config.kfac.to_dict(),
            "damping": read_config("vgg16_cifar10").kfac.damping.to_dict(),
        }
    trainer = train.prepare(config, optimizer)
    assert (trainer.steps, trainer.steps_per_call) == (2, 1)

    def rows(**options):
        return list(train.run(trainer, config, rate=1e-2, seed=1, **options))

    whole = rows()
    assert [row.epoch for row in whole] == [1, 2]
    assert np.isfinite(whole).all()

    store = Store(tmp_path / "checkpoint.npz", {"name": name}, epochs=0, seconds=1e-9)
    calls = []

    def stop(epochs):
        calls.append(epochs)
        if len(calls) == 4:  # in the middle of the second epoch, whose first step is kept
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rows(store=store, progress=stop)
    calls = []
    resumed = rows(store=store, progress=calls.append)
    assert calls == [1.5, 0.5]
    assert [row[:-1] for row in resumed] == [row[:-1] for row in whole]
    assert resumed[0].seconds != whole[0].seconds  # that of the interrupted run


@pytest.mark.parametrize(("depth", "count"), [(20, 269_722), (110, 1_727_962)])
def test_residual_networks_have_the_known_number_of_parameters(depth, count):
    model = read_config("resnet110_cifar10").model
    model.depth = depth
    assert parameters(model, (1, 32, 32, 3)) == count


def test_the_other_models_have_the_number_of_parameters_of_their_layers():
    def dense(*widths):
        return sum((a + 1) * b for a, b in itertools.pairwise(widths))

    autoencoder = read_config("fashion_mnist_autoencoder").model
    widths = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
    assert parameters(autoencoder, (1, 784), outputs=784) == dense(*widths)
    vgg, channels = (
        read_config("vgg16_cifar10").model,
        (3, *2 * [64], *2 * [128], *3 * [256], *6 * [512]),
    )
    norms = 2 * sum(channels[1:])
    convolutions = sum(9 * a * b for a, b in itertools.pairwise(channels))
    assert parameters(vgg, (1, 32, 32, 3)) == convolutions + norms + dense(2048, 4096, 4096, 10)
    vgg.update(pooled=5, hidden=())
    assert parameters(vgg, (1, 32, 32, 3)) == convolutions + norms + dense(512, 10)


def parameters(model, shape, outputs: int = 0) -> int:
    module = models.build(model, outputs=outputs)
    params, _ = jax.eval_shape(
        lambda key: models.init(module, key, jax.numpy.zeros(shape)), jax.random.key(0)
    )
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def test_a_character_is_predicted_from_those_before_it():
    config = read_config("char_transformer").model
    config.update(depth=1, width=8, heads=2)
    model, x = models.build(config, outputs=0), np.arange(12).reshape(1, 12)
    params, _ = jax.jit(lambda key: models.init(model, key, x))(jax.random.key(0))
    changed = x.copy()
    changed[0, 7] = 50
    predict = jax.jit(lambda tokens: models.apply(model, params, {}, tokens, train=False)[0])
    logits, other = predict(x), predict(changed)
    assert logits.shape == (1, 12, 97)
    np.testing.assert_allclose(logits[0, :7], other[0, :7], atol=1e-6)
    assert not np.allclose(logits[0, 7:], other[0, 7:], atol=1e-3)


def test_the_paper_gives_optimizers_their_own_batches_and_rates():
    config = read_config("resnet110_cifar10")
    assert [settings.of(config, name).batch_size for name in config.optimizers] == [
        64,
        64,
        128,
        128,
    ]
    assert [settings.base_rate(config, name) for name in config.optimizers] == [
        1e-2,
        1e-3,
        1e-2,
        1e-2,
    ]
    before = results.run_settings(config, Job("kfac", 1e-2, 0))
    config.per_optimizer.sgd.batch_size = 32
    config.data_dir = "elsewhere"
    assert results.run_settings(config, Job("kfac", 1e-2, 0)) == before
    assert results.run_settings(config, Job("sgd", 1e-2, 0))["batch_size"] == 32
    config.per_optimizer = {"sgd": {"batchsize": 32}}
    with pytest.raises(
        ValueError, match=r"config.per_optimizer.sgd: got 'batchsize', expected one of"
    ):
        settings.of(config, "sgd")


def test_the_autoencoder_needs_no_files_for_its_digits():
    config = read_config("fashion_mnist_autoencoder", "digits")
    assert config.data.name == "digits" and config.name == "digits_autoencoder"
    with pytest.raises(ValueError, match="got 'mnist', expected one of .'fashion_mnist', 'digits'"):
        read_config("fashion_mnist_autoencoder", "mnist")


RACES = ("digits", "char_transformer", "fashion_mnist_cnn", "fashion_mnist_autoencoder")


@pytest.mark.parametrize("name", RACES)
def test_a_race_has_one_grid_and_one_budget(name):
    config, default = read_config(name, "race"), read_config(name)
    assert config.name == f"{default.name}_race" and config.model == default.model
    assert {"adamw", "lion", "sophia", "muon", "soap", "kfac", "two_level_adaptive"} <= set(
        config.optimizers
    )
    own = [settings.of(config, optimizer) for optimizer in config.optimizers]
    assert len({(one.epochs, one.batch_size, one.budget_seconds, one.grid) for one in own}) == 1
    # AdamW alone has a schedule; without one the runs are those of before there were any
    scheduled = [optimizer for optimizer, one in zip(config.optimizers, own) if one.schedule]
    assert scheduled == ["adamw"]
    assert "schedule" not in results.run_settings(config, Job("sgd", 0.1, 0))
    assert results.run_settings(settings.of(config, "adamw"), Job("adamw", 0.1, 0))["schedule"]
    config.data_dir = "somewhere"
    sweep.validate(config)
    with pytest.raises(ValueError, match="got 'rally', expected one of"):
        read_config(name, "rally")


def test_the_paper_leaves_norm_layers_of_the_deep_linear_net_alone():
    default, paper = read_config("deep_linear"), read_config("deep_linear", "paper")
    assert (default.name, paper.name) == ("deep_linear", "deep_linear_paper")
    assert "normalization" not in default.kfac and paper.kfac.normalization == "pass"
    assert default.seeds == paper.seeds == 10 and default.data.to_dict() == paper.data.to_dict()
    # the library's own periods, but where the name says otherwise
    late = read_config("deep_linear", "late")
    assert "inverse_every" not in default.kfac and late.kfac.inverse_every == 100
    with pytest.raises(ValueError, match=r"got 'papers', expected one of \('default', 'paper', "):
        read_config("deep_linear", "papers")


@pytest.mark.parametrize("flag", ["--config.data_dir", "--config.data.data_dir"])
def test_the_directory_of_the_files_is_a_flag(flag, monkeypatch):
    arguments = ["program", f"--config={CONFIGS / 'fashion_mnist_cnn.py'}", f"{flag}=/some/where"]
    monkeypatch.setattr("sys.argv", arguments)  # where overrides of a file's entries are looked for
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", flag_values=values)
    values(arguments)
    config = pickle.loads(pickle.dumps(holder.value))  # as a worker process gets it
    assert config.data_dir == config.data.data_dir == "/some/where"


def test_labels_beyond_the_model_are_refused(tmp_path):
    config = reduced("fashion_mnist_cnn", tmp_path)
    config.model.outputs = 4
    with pytest.raises(
        ValueError, match=re.escape("config.model.outputs: got 4, expected at least the")
    ):
        train.prepare(config, "sgd")


def test_depths_that_no_residual_network_has_are_refused():
    model = read_config("resnet110_cifar10").model
    model.depth = 21
    with pytest.raises(ValueError, match=r"config.model.depth: got 21, expected 6 n \+ 2"):
        parameters(model, (1, 32, 32, 3))


def test_a_context_longer_than_the_positions_is_refused():
    model = read_config("char_transformer").model
    model.max_context = 4
    with pytest.raises(
        ValueError, match="config.data.context: got 5, expected at most config.model.max_context=4"
    ):
        models.init(models.build(model, outputs=0), jax.random.key(0), np.zeros((1, 5), np.int32))


@pytest.mark.parametrize(("name", "count"), [("rms_transformer", 5), ("lstm", 2)])
def test_models_of_rows_have_bare_parameters(name, count):
    model = models.build(read_config("uncovered", name).model, outputs=10)
    params, _ = jax.eval_shape(
        lambda key: models.init(model, key, np.zeros((1, 8, 8), np.float32)), jax.random.key(0)
    )
    bare = [
        path for path, _ in jax.tree.leaves_with_path(params) if path[-1].key in ("scale", "offset")
    ]
    assert len(bare) == count
    with pytest.raises(ValueError, match="got 'gru', expected one of"):
        read_config("uncovered", "gru")
