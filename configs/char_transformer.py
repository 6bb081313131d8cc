"""A small GPT that predicts the next character of Python's help texts.

The texts of `pydoc` come with Python; `--config.data.file=FILE` takes another one. The reported
loss is in nats per character.
`:race` has what a user would take instead beside K-FAC, all with one grid, three epochs and a
third of the texts.
"""

import ml_collections

from kfac_optax.experiments import racing

VARIANTS = ("default", "race")


def get_config(variant: str = "default") -> ml_collections.ConfigDict:
    """Returns the settings of the experiment; `variant` is one of `VARIANTS`."""
    if variant not in VARIANTS:
        raise ValueError(f"--config=...:{variant}: got {variant!r}, expected one of {VARIANTS}")
    context = ml_collections.FieldReference(64)
    config = ml_collections.ConfigDict(
        {
            "name": "char_transformer",
            "title": "Python's help texts, small character transformer",
            "data": {
                "name": "characters",
                "train": 6_000,
                "test": 600,
                "context": context,
                "file": "",
            },
            "model": {
                "name": "char_transformer",
                "depth": 2,
                "width": 64,
                "heads": 4,
                "outputs": 97,  # printable ASCII, line break, anything else
                "max_context": context,
            },
            "likelihood": "categorical",
            "optimizers": ("sgd", "adam", "kfac", "two_level"),
            "seeds": 1,
            "epochs": 10,
            "batch_size": 32,
            "learning_rate": 1e-2,
            "schedule": {"epochs": (8,), "factors": (1.0, 0.1)},
            "momentum": 0.9,
            "weight_decay": 1e-5,
            "kfac": {
                "damping": 1e-2,
                "kl_clip": 1e-3,
                "curvature_every": 10,
                "inverse_every": 50,
                "inverse": "eigh",
            },
            "adaptive": {},  # options of kfac_adaptive and two_level_adaptive, which tune themselves
            # Second table: every optimizer at its best rate of this grid.
            "tune": True,
            "grid": (1e-1, 3e-2, 1e-2, 3e-3, 1e-3),
            "targets": (2.5, 2.0, 1.8),
            "evaluation_batch": 200,
            "steps_per_call": 50,
            "checkpoint_every": 0,  # epochs; 0: only by the clock
            "checkpoint_seconds": 60,
            "workers": 2,  # processes, each with one thread; 1 trains and times one run at a time in this process
            "out": "",  # results/<name> when empty
        }
    )
    if variant == "default":
        return config
    config.kfac.kl_clip = 1e-2  # as in the papers
    return racing.as_race(config, epochs=3, data={"train": 2_000})
