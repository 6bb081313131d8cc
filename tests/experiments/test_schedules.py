import jax
import numpy as np
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
