"""The layout of states is a promise: it changes together with the number of its version only.

`python -m tests.compat.test_state_format` writes the file of a new version.
"""

import inspect
import json
import pathlib

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AbstractMesh

import kfac_optax as ko
from kfac_optax.engine.state import STATE_FORMAT
from tests import helpers as h

PATH = pathlib.Path(__file__).parent / "state_formats" / f"{STATE_FORMAT}.json"
PROMISED = (
    "kfac",
    "kfac_two_level",
    "kfac_adaptive",
    "ekfac",
    "eva",
    "mkor",
    "rs_kfac",
    "skfac",
    "shampoo",
    "soap",
    "spring",
)


def described(name):
    problem = h.plain_problem()
    of_gradients = name not in ko.CATALOGUE
    # a bound on the whole movement has a state of its own around that of a preset
    known = inspect.signature(getattr(ko, name)).parameters
    alone = {"bound": "damped"} if "bound" in known else {}
    tx = (
        getattr(ko, name)(learning_rate=0.1)
        if of_gradients
        else ko.CATALOGUE[name].build(problem.layers, **alone)
    )
    state = jax.eval_shape(tx.init, problem.params)
    return ko.describe_state(state, problem.params)["state"]


@pytest.mark.parametrize("name", PROMISED)
def test_the_layout_is_that_of_its_version(name):
    """Where this fails a state saved by the last version is of no use to this one: add one to
    `STATE_FORMAT` and write the new file beside the old ones.
    """
    promised = json.loads(PATH.read_text())[name]
    assert described(name) == promised


def test_every_version_has_its_file():
    versions = sorted(int(path.stem) for path in PATH.parent.glob("*.json"))
    assert versions == list(range(1, STATE_FORMAT + 1))
    layouts = [path.read_text() for path in PATH.parent.glob("*.json")]
    assert len(set(layouts)) == len(layouts), "a new number for the same layout"


def saved(name="kfac", problem=None, **settings):
    """A description as it comes back from a file."""
    problem = problem or h.plain_problem()
    state = jax.eval_shape(h.make_tx(name, problem, **settings).init, problem.params)
    return json.loads(json.dumps(ko.describe_state(state, problem.params, problem.layers)))


def refused(found, **more):
    problem = h.plain_problem()
    with pytest.raises(ValueError) as error:
        ko.check_state(found, h.make_tx("kfac", problem), problem.params, **more)
    return str(error.value)


def test_what_fits_is_taken():
    problem = h.plain_problem()
    tx = h.make_tx("kfac", problem, damping=0.3)  # settings that change no array may change
    ko.check_state(saved(), tx, problem.params)
    ko.check_state(saved(), tx, problem.params, layers=problem.layers)
    ko.check_state(h.initial_state("kfac"), tx, problem.params)


def test_another_version_is_refused():
    found = saved() | {"format": STATE_FORMAT + 1}
    assert f"saved in format {STATE_FORMAT + 1}; this version of kfac_optax has" in refused(found)


def test_another_model_is_refused_with_the_first_difference():
    def predict(params, x):
        x = jnp.tanh(h.dense(x, params["first"]["w"]))
        return ko.Categorical(h.dense(x, params["last"]["w"], params["last"]["b"]))

    params = h.plain_params()
    del params["first"]["b"]
    found = saved(problem=h.make_problem(predict, params, *h.data()))
    message = (
        "array 'first/b' of the parameters was saved as nothing; expected float32[4]. It is of"
    )
    assert message in refused(found)


def test_layers_that_run_in_another_order_are_refused():
    """Their arrays have the same names and shapes: only the description of layers tells."""

    def backwards(params, x):
        swapped = {"first": params["last"], "last": params["first"]}
        return h.plain_predict(swapped, x)

    found = saved(problem=h.make_problem(backwards, h.plain_params(), *h.data()))
    problem = h.plain_problem()
    ko.check_state(found, h.make_tx("kfac", problem), problem.params)
    message = (
        "layer 0 in order of execution was saved as 'last: dense 4x4 with bias'; expected "
        "'first: dense 4x4 with bias'"
    )
    assert message in refused(found, layers=problem.layers)
    del found["layers"]
    assert "got layers=, but none were saved" in refused(found, layers=problem.layers)


def described_on(devices, fraction=0.0, statistics="averaged", named=True):
    """Transformation, parameters, layers and description of nine equal layers on some devices."""
    mesh = AbstractMesh((devices,), ("data",))
    placement = ko.Placement("data", fraction, mesh, statistics=statistics)

    def predict(params, x):
        return ko.Normal(sum(h.dense(x, w) for w in params))

    params = [jnp.eye(3)] * 9
    layers = ko.ggn(predict).layers(params, jnp.ones((2, 3)))
    tx = ko.kfac(layers, learning_rate=0.1, axis_name="data", placement=placement, bound="damped")
    state, words = jax.eval_shape(tx.init, params), {"placement": placement} if named else {}
    return tx, params, words, json.loads(json.dumps(ko.describe_state(state, params, **words)))


def test_placements_whose_arrays_have_equal_shapes_are_told_apart():
    """Nine matrices have 12 places on 12 devices, and on 6 with two on each."""
    tx, params, words, found = described_on(12)
    ko.check_state(found, tx, params, **words)
    for other in (described_on(6), described_on(12, 1 / 6), described_on(12, 1.0, "local")):
        with pytest.raises(ValueError, match="saved divided over 12 devices, each inverse kept by"):
            ko.check_state(found, other[0], params, **other[2])
    assert described_on(6)[3]["state"] == found["state"]
    with pytest.raises(ValueError, match="divided over 12 devices.* expected it over no devices"):
        ko.check_state(found, tx, params)


def test_a_placement_that_nobody_saved_is_asked_for():
    tx, params, _, found = described_on(12, named=False)
    ko.check_state(found, tx, params)
    whole = described_on(12, 1.0)
    with pytest.raises(ValueError, match="got a placement that divides.* but none was saved"):
        ko.check_state(found, tx, params, **described_on(12)[2])
    # one that leaves states whole has nothing to say of older descriptions
    ko.check_state(whole[3], whole[0], params, **whole[2])
    ko.check_state({k: x for k, x in whole[3].items() if k != "placement"}, *whole[:2], **whole[2])


def test_another_part_of_a_parameter_is_refused():
    """The only part that has a layer is named as its parameter is."""

    def description(start):
        def predict(params, x):
            return ko.Normal(x @ jax.lax.slice_in_dim(params["w"], start, start + 2, axis=1))

        params, x = {"w": jnp.zeros((3, 4))}, jnp.ones((5, 3))
        layers = ko.ggn(predict).layers(params, x)
        tx = ko.kfac(layers, learning_rate=0.1, bound="damped")
        return tx, params, layers, ko.describe_state(tx.init(params), params, layers)

    *_, found = description(0)
    tx, params, layers, own = description(2)
    ko.check_state(own, tx, params, layers)
    with pytest.raises(ValueError, match=r"saved as 'w: dense 3x2, part \[:, 0:2\]'; expected 'w:"):
        ko.check_state(found, tx, params, layers)


def test_another_optimizer_is_refused_with_the_first_difference():
    bucket = "inverses/dense_5x4_bias"
    assert f"preconditioner/{bucket}/inputs/vectors' of the state was saved as nothing" in refused(
        saved(inverse="cholesky")
    )
    adam = optax.adam(0.1).init(h.plain_params())
    assert "array 'preconditioner/kfac_count' of the state was saved as nothing" in refused(adam)


if __name__ == "__main__":
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(json.dumps({name: described(name) for name in PROMISED}, indent=1) + "\n")
