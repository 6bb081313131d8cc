import jax
import numpy as np
import optax
import pytest

from kfac_optax.experiments import schedules


def test_the_rate_falls_at_the_given_epochs():
    factor = schedules.rate_factor({"epochs": (40, 80), "factors": (1.0, 0.1, 0.01)}, steps=391)
    steps = np.array([0, 40 * 391 - 1, 40 * 391, 80 * 391 - 1, 80 * 391, 10**6])
    expected = np.float32([1.0, 1.0, 0.1, 0.1, 0.01, 0.01])
    np.testing.assert_array_equal([jax.jit(factor)(step) for step in steps], expected)
    assert schedules.rate_factor(None, steps=391) is None
    assert schedules.rate_factor({}, steps=391) is None


def test_options_may_change_with_the_epoch():
    damping = {"epochs": (2,), "values": (0.1, 0.05)}
    options = schedules.resolve(
        {"damping": damping, "kl_clip": None}, steps=10, where="config.kfac"
    )
    np.testing.assert_array_equal(
        [options["damping"](19), options["damping"](20)], np.float32([0.1, 0.05])
    )
    assert options["kl_clip"] is None


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"epochs": (1, 2), "factors": (1.0, 0.1)}, "config.schedule: got 2 values, expected 3"),
        (
            {"epochs": (2, 1), "factors": (1.0, 0.1, 0.01)},
            r"config.schedule: got epochs \(2, 1\), expected increasing",
        ),
        (
            {"epochs": (0,), "factors": (1.0, 0.1)},
            r"got epochs \(0,\), expected increasing positive",
        ),
    ],
)
def test_bad_schedules_are_refused(section, message):
    with pytest.raises(ValueError, match=message):
        schedules.rate_factor(section, steps=10)


def test_a_warm_up_and_a_cosine_take_all_epochs():
    section = {"warmup": 0.1, "final": 0.2}
    factor = schedules.rate_factor(section, steps=10, epochs=4)
    got = [float(jax.jit(factor)(step)) for step in (0, 1, 3, 4, 22, 40)]
    # four steps up, then 1 to 0.2 in 36
    np.testing.assert_allclose(got, [0.25, 0.5, 1.0, 1.0, 0.6, 0.2], rtol=1e-6)
    # that of Optax, which begins at zero
    optax_own = optax.warmup_cosine_decay_schedule(0.25, 1.0, 3, 39, 0.2)
    steps = np.arange(3)
    np.testing.assert_allclose([factor(i) for i in steps], [optax_own(i) for i in steps], rtol=1e-6)
    # a constant rate
    assert float(schedules.rate_factor({"warmup": 0.0, "final": 1.0}, steps=10, epochs=4)(0)) == 1.0
    with pytest.raises(
        ValueError, match=r"config.schedule: got warmup=1.5 and final=0.0, expected"
    ):
        schedules.rate_factor({"warmup": 1.5, "final": 0.0}, steps=10, epochs=4)


@pytest.mark.parametrize("section", [{"warmup": 0.1}, {"final": 0.1}, {"epochs": (1,)}])
def test_half_a_schedule_is_refused(section):
    with pytest.raises(ValueError, match="expected epochs and factors, or warmup and final"):
        schedules.rate_factor(section, steps=10, epochs=4)
