"""One table of the runs of several comparisons: read from disk, ranked, written."""

import csv
import json
import math

import numpy as np
import pytest

from kfac_optax.experiments import race, results, settings, standings, stored, train, workers
from kfac_optax.experiments.folder import Stopped
from kfac_optax.experiments.results import Job

SIZES = {"compile_seconds": 1.5, "state_bytes": 800, "parameter_bytes": 400}


def write(folder, config, job, losses, *, seconds=0.5, **details):
    """A run of one row an epoch, on disk as a sweep leaves it."""
    rows = [train.Metrics(i + 1, x, 0.5, x, 0.5, seconds) for i, x in enumerate(losses)]
    own = results.run_settings(settings.of(config, job.optimizer), job)
    results.record(folder / "runs" / job.name, own, rows, {"steps_per_epoch": 4, **details})


@pytest.fixture
def folders(deep_linear, tmp_path):
    """Two problems of four epochs: SGD at two rates, Adam slow, two levels best but one diverges."""
    deep_linear.epochs = 4
    first, second = tmp_path / "first", tmp_path / "second"
    for seed in range(2):
        write(first, deep_linear, Job("sgd", 0.1, seed), [4, 3, 2, 1.0 + seed], **SIZES)
        write(first, deep_linear, Job("kfac_two_level", 0.1, seed), [2, 1, 0.5, 0.25], **SIZES)
    write(first, deep_linear, Job("sgd", 0.01, 0), [4, 3.5, 3, 2.5], **SIZES)
    # an older record, without bytes, and steps of two seconds
    write(first, deep_linear, Job("adam", 0.1, 0), [1, 0.9, 0.8, 0.7], seconds=2.0)
    deep_linear.batch_size = 32
    write(second, deep_linear, Job("sgd", 0.1, 0), [3, 2, 1, 0.5], **SIZES)
    write(second, deep_linear, Job("adam", 0.1, 0), [3, 1, 0.4, 0.3], **SIZES)
    write(second, deep_linear, Job("kfac_two_level", 0.1, 0), [1, 0.1, math.nan], **SIZES)
    return first, second


def rows_of(found):
    return {row.optimizer: row for row in found.rows}


def test_losses_are_read_at_equal_seconds_and_epochs(folders):
    found = standings.standing(stored.read(folders[0]), seconds=1.25, epochs=2)
    rows = rows_of(found)
    # 1.25 s: half way from the second row to the third
    np.testing.assert_allclose(rows["sgd"].losses["seconds"].mean, 2.5)
    np.testing.assert_allclose(rows["kfac_two_level"].losses["seconds"].mean, 0.75)
    assert math.isnan(rows["adam"].losses["seconds"].mean)  # its first row comes at 2 s
    assert [rows[name].losses["epochs"].mean for name in ("sgd", "adam")] == [3.0, 0.9]
    assert {name: row.losses["end"].rank for name, row in rows.items()} == {
        "kfac_two_level": 1,
        "adam": 2,
        "sgd": 3,
    }
    assert rows["sgd"].rate == 0.1 and len(rows["sgd"].group) == 2
    np.testing.assert_allclose(rows["sgd"].losses["end"][1:3], results.interval([1.0, 2.0]))
    np.testing.assert_allclose([rows["sgd"].over_sgd, rows["adam"].over_sgd], [1.0, 4.0])
    assert rows["adam"].costs == stored.Costs()
    assert rows["sgd"].costs == stored.Costs(1.5, 800, 400)


def test_a_run_that_ended_counts_with_its_last_loss(folders):
    rows = rows_of(standings.standing(stored.read(folders[0]), seconds=4.0, epochs=10))
    assert rows["sgd"].losses["seconds"].ended and not rows["adam"].losses["seconds"].ended
    assert rows["sgd"].losses["seconds"].mean == 1.5
    np.testing.assert_allclose(rows["adam"].losses["seconds"].mean, 0.9)
    # no more epochs than there are
    assert rows["sgd"].losses["epochs"].mean == rows["sgd"].losses["end"].mean


def test_a_method_that_lost_a_seed_is_behind_all_others(folders):
    found = standings.standing(stored.read(folders[1]), seconds=None, epochs=2)
    rows = rows_of(found)
    assert found.seconds == 2.0  # no budget: when half of the runs are through
    assert rows["kfac_two_level"].diverged == 1
    assert rows["kfac_two_level"].losses["end"].rank is None
    assert [row.optimizer for row in found.rows] == ["adam", "sgd", "kfac_two_level"]
    ranks = standings.mean_ranks(
        [standings.standing(stored.read(path), seconds=1.0, epochs=2) for path in folders], "end"
    )
    assert ranks == {"kfac_two_level": 2.0, "adam": 1.5, "sgd": 2.5}


def test_equal_losses_share_a_rank(folders, deep_linear):
    write(folders[1], deep_linear, Job("muon", 0.1, 0), [3, 1, 0.4, 0.3], **SIZES)
    found = standings.standing(stored.read(folders[1]), seconds=1.0, epochs=2)
    ranks = {row.optimizer: row.losses["end"].rank for row in found.rows}
    assert ranks == {"adam": 1, "muon": 1, "sgd": 3, "kfac_two_level": None}
    assert "in the end: Adam 0.3, level with Muon 0.3" in race.verdicts(found)[2]


def test_the_command_writes_one_table_and_one_figure(folders, tmp_path, capsys):
    out = tmp_path / "out"
    race.main([*map(str, folders), "--seconds=1", "--epochs=2", f"--out={out}"])
    text = capsys.readouterr().out
    assert (
        "first after 1 s: two-level K-FAC 1, then SGD 3, on every seed; best of Optax SGD 3" in text
    )
    assert "second in the end: Adam 0.3, then SGD 0.5\n" in text
    lines = (out / "race.md").read_text().splitlines()
    assert lines[0].startswith("| method | first 1 s | first 2 ep | first end | second 1 s |")
    adam = next(line for line in lines if line.startswith("| Adam"))
    assert adam.split(" | ")[1:4] == ["-", "0.9 (1)", "0.7 (2)"]
    two_level = next(line for line in lines if line.startswith("| two-level K-FAC"))
    assert "| diverged |" in two_level and two_level.endswith("| 1 | 2 | 1.5 |")
    with open(out / "race.csv") as file:
        cells = {(row["problem"], row["optimizer"]): row for row in csv.DictReader(file)}
    assert len(cells) == 6
    assert cells["first", "sgd"]["state_bytes"] == "800"
    assert cells["first", "adam"]["state_bytes"] == ""
    assert cells["first", "sgd"]["edge_of_grid"] == "True"
    assert cells["first", "adam"]["edge_of_grid"] == "False"
    assert "| 3* (2) |" in next(line for line in lines if line.startswith("| SGD"))
    assert cells["first", "kfac_two_level"]["rank_seconds"] == "1"
    assert (out / "race.png").stat().st_size > 1000


def test_missing_bytes_are_those_of_a_run(deep_linear, tmp_path, trainers):
    """Traced from the settings that a record keeps, with lists in place of tuples."""
    write(tmp_path, deep_linear, Job("adam", 0.1, 0), [1.0, 0.5])
    costs = stored.with_sizes(stored.read(tmp_path)).costs["adam"]
    trainer = trainers("adam")
    assert costs.state_bytes == trainer.state_bytes
    assert costs.parameter_bytes == trainer.parameter_bytes
    # two moments and two counts, of the rule and of the rate
    assert 2 * costs.parameter_bytes < costs.state_bytes <= 2 * costs.parameter_bytes + 8


def test_a_sweep_records_bytes(deep_linear, tmp_path):
    deep_linear.update(optimizers=("sgd",), seeds=1, tune=False, epochs=1)
    workers.train_all(deep_linear, tmp_path, [Job("sgd", 1e-3, 0)], lambda event: None)
    costs = stored.read(tmp_path).costs["sgd"]
    assert costs.state_bytes == costs.parameter_bytes  # the momentum
    assert costs.compile_seconds > 0


def test_what_is_no_race_is_refused(folders, deep_linear, tmp_path, capsys):
    with pytest.raises(Stopped, match=r"nowhere: got no finished run, expected the results folder"):
        stored.read(tmp_path / "nowhere")
    deep_linear.epochs = 1  # a trial that was left there
    write(folders[0], deep_linear, Job("muon", 0.1, 0), [1.0])
    with pytest.raises(SystemExit, match=r"runs with different 'epochs' \(.*1 in muon-lr0.1-seed0"):
        race.main([str(folders[0])])
    path = folders[1] / "runs" / "sgd-lr0.1-seed0" / "run.json"
    path.write_text(json.dumps({"settings": {"optimizer": "sgd"}}))
    with pytest.raises(Stopped, match="got no record of a run"):
        stored.read(folders[1])
    for words, message in (
        (["--seconds=0"], "--seconds: got 0.0, expected a positive number"),
        ([str(folders[0])], "expected names that tell them apart"),
    ):
        with pytest.raises(SystemExit):
            race.main([str(folders[0]), *words])
        assert message in capsys.readouterr().err


def test_seconds_come_from_timed_runs_of_the_same_problem(folders, deep_linear, tmp_path):
    deep_linear.epochs, deep_linear.batch_size = 1, 32
    quiet = tmp_path / "quiet"
    write(quiet, deep_linear, Job("sgd", 0.3, 0), [3], seconds=0.4, compile_seconds=0.25)
    write(quiet, deep_linear, Job("adam", 0.3, 0), [3], seconds=0.8)
    found = stored.with_times(stored.read(folders[1]), stored.read(quiet))
    rows = rows_of(standings.standing(found, seconds=1.2, epochs=2))
    np.testing.assert_allclose([rows["sgd"].ms_per_step, rows["adam"].ms_per_step], [100, 200])
    # three epochs of SGD, one and a half of Adam, nothing of what was not timed
    np.testing.assert_allclose(rows["sgd"].losses["seconds"].mean, 1.0)
    np.testing.assert_allclose(rows["adam"].losses["seconds"].mean, 2.0)
    assert rows["kfac_two_level"].losses["seconds"].rank is None
    assert rows["sgd"].costs == stored.Costs(0.25, 800, 400)
    assert found.costs["kfac_two_level"].compile_seconds is None
    median = standings.standing(found, seconds=None, epochs=2).seconds
    np.testing.assert_allclose(median, 2.4)


def test_timed_runs_of_another_problem_are_refused(folders, tmp_path, capsys):
    words = ["--timing", str(folders[0]), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="first: timed runs with batch_size .*of second, 32"):
        race.main([str(folders[1]), *words])
    with pytest.raises(SystemExit):
        race.main([*map(str, folders), *words])
    assert "--timing: got 1 folders, expected one for each of the 2" in capsys.readouterr().err


def test_timed_runs_of_a_method_with_other_settings_are_refused(folders, deep_linear, tmp_path):
    """Their steps may be shorter."""
    race_of = stored.read(folders[1])
    deep_linear.batch_size = 32
    deep_linear.kfac.inverse_every = 1000
    write(tmp_path / "lazy", deep_linear, Job("sgd", 0.3, 0), [3])
    stored.with_times(race_of, stored.read(tmp_path / "lazy"))  # nothing to SGD
    write(tmp_path / "lazy", deep_linear, Job("kfac_two_level", 0.3, 0), [3])
    with pytest.raises(Stopped, match=r"lazy: timed runs of kfac_two_level with kfac .*1000"):
        stored.with_times(race_of, stored.read(tmp_path / "lazy"))
    write(tmp_path / "none", deep_linear, Job("muon", 0.3, 0), [3])
    with pytest.raises(Stopped, match="none: timed runs of muon, expected some methods of second"):
        stored.with_times(race_of, stored.read(tmp_path / "none"))


def test_runs_of_one_method_with_two_settings_are_refused(folders, deep_linear):
    deep_linear.epochs, deep_linear.batch_size, deep_linear.momentum = 4, 32, 0.5
    write(folders[1], deep_linear, Job("sgd", 0.01, 0), [3, 2, 1, 0.5], **SIZES)
    with pytest.raises(Stopped, match="second: runs of sgd with different 'momentum' .0.5 and 0.9"):
        stored.read(folders[1])
