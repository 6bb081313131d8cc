"""The race to a loss in steps of SGD."""

import numpy as np

import kfac_optax as ko
from benchmarks import starts, to_loss


def test_a_tiny_run_falls_and_is_counted_in_steps_of_sgd():
    pixels = np.random.default_rng(0).integers(0, 256, (24, 12), np.uint8)
    problem = to_loss.Problem(to_loss.SETTINGS["periods 1/5"], pixels, 8, (4, 2))
    run = to_loss.train(problem, pixels, seed=0, steps=3, batch=8)
    assert len(run.losses) == 4 and len(run.seconds) == len(run.sgd) == 3
    assert run.losses[-1] < run.losses[0] < to_loss.TARGETS[-1]
    # another start of the same problem
    other = to_loss.train(problem, pixels, seed=1, steps=1, batch=8)
    assert other.losses[0] != run.losses[0]
    # the loss of the start is below all targets
    (row,) = to_loss.rows({"tiny": [run, run]}).values()
    assert [row[f"{target:g}"] for target in to_loss.TARGETS] == ["0 (0) 0 (0)"] * 6


def test_a_start_is_told_by_its_losses_and_rejections():
    pixels = np.random.default_rng(0).integers(0, 256, (24, 12), np.uint8)
    problem = to_loss.Problem(to_loss.SETTINGS["defaults"], pixels, 8, (4, 2))
    start = starts.follow(problem, pixels, seed=0, steps=6, batch=8)
    assert len(start.losses) == 7 and start.losses[-1] < start.losses[0]
    assert start.rejected == 0 and start.largest_damping == np.float32(0.03)
    found = starts.rows({0: start, 1: start._replace(losses=[9.0] * 7)}, shown=(2, 6))
    assert found["seed 1"]["2"] == "9.0" and found["worst"]["6"] == "9.0"
    assert found["mean"]["6"] == f"{(start.losses[6] + 9) / 2:.1f}"


def test_every_setting_says_when_statistics_and_inverses_are_due():
    due = {}
    for name, setting in to_loss.SETTINGS.items():
        schedule = ko.HostSchedule(adapt_every=5, **setting.schedule)
        kinds = [schedule(step) for step in range(40)]
        due[name] = [sum(bool(kind[what]) for kind in kinds) for what in ("measure", "refresh")]
    # inverses at 0, 5, 10, 15 and 30
    usual = [8, 5]
    assert due.pop("statistics in each of the first 20 steps") == [20 + 4, 5]
    assert due.pop("inverses every 10") == [8, 6]
    assert due.pop("periods 1/5") == [40, 8]
    assert all(counts == usual for counts in due.values())


def test_every_epoch_has_every_image_once():
    pixels = np.arange(10, dtype=np.uint8)[:, None]
    drawn = to_loss.batches(pixels, 0, 5)
    for _ in range(2):
        seen = np.concatenate([next(drawn), next(drawn)]) * 255
        np.testing.assert_allclose(np.sort(seen[:, 0]), np.arange(10), rtol=1e-6)
