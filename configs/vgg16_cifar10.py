"""VGG16 with batch norm on CIFAR-10, the network of the papers on online and randomized
decompositions.

Puiu (2022), "Brand New K-FACs: Speeding up K-FAC with Online Decomposition Updates" and "Randomized
K-FACs", whose point is the cost of wide layers. Their network is VGG16 with a change before its
fully connected layers; here the last pooling is left out, so that the first of these has 2048
inputs. Batch, weight decay, rate, damping and periods are of the size they use; the stages of the
schedules are a simple choice of ours. Needs the CIFAR-10 files, `--config.data_dir=DIR`, and a GPU.
Small enough for two CPU cores: `--config=configs/vgg16_cifar10.py:fashion_mnist`, a quarter of the
channels on images of Fashion-MNIST (Debian package dataset-fashion-mnist), at equal seconds.
"""

import ml_collections


def get_config(variant: str = "cifar10") -> ml_collections.ConfigDict:
    """Returns the settings of the experiment; `variant` is `cifar10` or `fashion_mnist`."""
    if variant not in ("cifar10", "fashion_mnist"):
        raise ValueError(
            f"--config=...:{variant}: got {variant!r}, expected 'cifar10' or 'fashion_mnist'"
        )
    data_dir = ml_collections.FieldReference("")
    config = ml_collections.ConfigDict(
        {
            "name": "vgg16_cifar10",
            "title": "VGG16 with batch norm on CIFAR-10",
            "data_dir": data_dir,
            "data": {"name": "cifar10", "data_dir": data_dir, "train": 50_000, "test": 10_000},
            # Mean and standard deviation of the training pixels per channel.
            "inputs": {
                "mean": (0.4914, 0.4822, 0.4465),
                "std": (0.2470, 0.2435, 0.2616),
                "crop": 4,
                "flip": True,
            },
            "model": {
                "name": "vgg16",
                "hidden": (4096, 4096),
                "pooled": 4,
                "width": 64,
                "groups": (2, 2, 3, 3, 3),
                "outputs": 10,
                "bn_momentum": 0.9,
            },
            "likelihood": "categorical",
            "optimizers": (
                "sgd",
                "kfac",
                "two_level",
                "rs_kfac",
                "b_kfac",
                "b_r_kfac",
                "b_kfac_c",
                "b_r_c",
            ),
            "seeds": 1,
            "epochs": 50,
            "batch_size": 256,
            "learning_rate": 0.3,
            "per_optimizer": {"sgd": {"learning_rate": 0.1}},
            "schedule": {"epochs": (2, 13, 27, 40), "factors": (1.0, 0.4, 0.1, 0.01, 0.003)},
            "momentum": 0.9,
            "weight_decay": 7e-4,
            "kfac": {
                "damping": {"epochs": (25, 35), "values": (0.1, 0.05, 0.01)},
                "kl_clip": 7e-2,
                "curvature_every": 10,
                "inverse_every": 50,
                "inverse": "eigh",
                # norm layers are left alone, as in the papers
                "normalization": "pass",
                "uncovered": "pass",
            },
            # What comes on top for inverses of low rank; of the size the papers use. Online are the
            # fully connected layers.
            "low_rank": {"rank": 220, "correct_every": 5, "correct_share": 0.2},
            "tune": False,
            "grid": (0.3, 0.1, 0.03),
            "targets": (0.5, 0.1, 0.02),
            "evaluation_batch": 1_000,
            "python_loop": True,  # convolutions in a compiled loop are slow on a CPU
            "steps_per_call": 50,
            "checkpoint_every": 1,  # epochs
            "checkpoint_seconds": 300,
            "workers": 1,
            "out": "",  # results/<name> when empty
        }
    )
    if variant == "fashion_mnist":
        config.name, config.title = (
            "vgg16_fashion_mnist",
            "narrow VGG16 with batch norm on Fashion-MNIST",
        )
        config.data.update(name="fashion_mnist", train=12_000, test=2_000)
        config.inputs = ml_collections.ConfigDict({"mean": (0.286,), "std": (0.353,)})
        # 3x3 places of 128 channels before these
        config.model.update(width=16, pooled=3, hidden=(1024, 1024))
        config.optimizers = (
            "sgd",
            "adam",
            "kfac",
            "rs_kfac",
            "b_kfac",
            "b_r_kfac",
            "b_kfac_c",
            "b_r_c",
        )
        config.per_optimizer = ml_collections.ConfigDict(
            {"adam": {"learning_rate": 1e-3, "grid": (3e-3, 1e-3)}}
        )
        config.update(seeds=3, epochs=1000, batch_size=128, learning_rate=0.03, checkpoint_every=0)
        del config.schedule
        config.update(
            tune=True, tune_seeds=0, grid=(0.1, 0.03), targets=(1.0, 0.5), steps_per_call=5
        )
        config.update({"report_every": 5, "evaluate_every": 0, "budget_seconds": 30.0})
        config.kfac = {
            **config.kfac.to_dict(),
            "damping": 0.1,
            "inverse": "cholesky",
            "factored_gradient": True,
        }
        config.low_rank.rank = 128
    return config
