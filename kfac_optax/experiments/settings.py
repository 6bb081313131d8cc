"""The settings of one optimizer's runs within an experiment."""

import json
from typing import Any

import ml_collections

# Options for methods of one kind, beside those of `kfac`.
SECTIONS = ("low_rank", "sample_space", "posterior", "mfac")

# Entries that decide which runs there are, how they are shown, kept or where files lie, not what
# happens in one.
_OF_THE_SWEEP = {"name", "title", "optimizers", "seeds", "learning_rate"}
_OF_THE_SWEEP |= {"tune", "tune_seeds", "grid", "targets", "workers", "out"}
_OF_THE_SWEEP |= {
    "data_dir",
    "steps_per_call",
    "checkpoint_every",
    "checkpoint_seconds",
    "evaluation_batch",
}
# Entries that change nothing where they are 0, False or empty, so that runs made before there were any
# stay valid.
_OFF_AT_ZERO = ("report_every", "evaluate_every", "budget_seconds", "python_loop", "subsample")
_OFF_AT_ZERO += ("schedule",)


def of(config: ml_collections.ConfigDict, optimizer: str) -> ml_collections.ConfigDict:
    """The experiment as one optimizer sees it: `config.per_optimizer.<name>` replaces entries of
    the same name.

    Returns:
        A copy without the section `per_optimizer`; `config` itself where it has none.

    Raises:
        ValueError: an entry of the section that the experiment does not have.
    """
    if "per_optimizer" not in config:
        return config
    own = ml_collections.ConfigDict(config.to_dict())
    changes = own.per_optimizer.get(optimizer, {})
    del own.per_optimizer
    for name, value in changes.items():
        if name not in own:
            raise ValueError(
                f"config.per_optimizer.{optimizer}: got {name!r}, expected one of "
                f"{sorted(own.keys())}"
            )
        own[name] = value
    return own


def base_rate(config: ml_collections.ConfigDict, optimizer: str) -> float:
    """The learning rate of an optimizer where rates are not tuned."""
    return of(config, optimizer).learning_rate


def rates(config: ml_collections.ConfigDict, optimizer: str, *, tuned: bool) -> list[float]:
    """The learning rates that an optimizer is tried with, its own first; only that one where it is
    not tuned.
    """
    own = of(config, optimizer)
    grid = own.grid if config.tune and tuned else ()
    return list(dict.fromkeys((own.learning_rate, *grid)))


def identity(
    config: ml_collections.ConfigDict,
    optimizer: str,
    *,
    curvature: bool,
    adaptive: bool = False,
    section: str = "",
    momentum: str = "behind",
) -> dict[str, Any]:
    """All that decides the outcome of an optimizer's runs besides rate and seed, as JSON gives it
    back.
    """
    settings = {k: v for k, v in of(config, optimizer).to_dict().items() if k not in _OF_THE_SWEEP}
    settings["data"].pop("data_dir", None)
    settings["evaluate_with"] = settings.get("evaluate_with") or "fresh"
    for name in _OFF_AT_ZERO:
        if not settings.get(name):
            settings.pop(name, None)
    if not curvature:
        settings.pop("kfac", None)
        settings.pop("subsample", None)
    if not adaptive:
        settings.pop("adaptive", None)
    if momentum != "behind":
        value = settings.pop("momentum", None)
        settings |= {"average": value} if momentum == "before" else {}
    for name in SECTIONS:
        if name != section:
            settings.pop(name, None)
    return json.loads(json.dumps(settings))
