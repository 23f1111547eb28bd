"""The shipped configs hold the paper's table."""

from pathlib import Path

import pytest

from experiments.config import load_config

CONFIGS = Path(__file__).resolve().parents[3] / "configs"

# name: model, optimizer, lr, mode, tau_prox, epochs
PAPER = {
    "mlp_sgd_exact": ("mlp", "sgd", 1, "prox_exact", 0.05, 50),
    "mlp_sgd_cg3": ("mlp", "sgd", 1, "prox_cg3", 0.05, 50),
    "mlp_sgd_cg5": ("mlp", "sgd", 1, "prox_cg5", 0.05, 50),
    "mlp_sgd_cg10": ("mlp", "sgd", 1, "prox_cg10", 0.05, 50),
    "mlp_sgd_gradient": ("mlp", "sgd", 0.05, "gradient", 0.05, 1000),
    "convnet_adam_cg3": ("convnet", "adam", 1e-3, "prox_cg3", 1, 50),
    "convnet_adam_cg10": ("convnet", "adam", 1e-3, "prox_cg10", 1, 50),
    "convnet_adam_gradient": ("convnet", "adam", 1e-3, "gradient", 1, 1000),
}
TEXT = {name.replace("convnet", "convnet_text"): row for name, row in PAPER.items() if "convnet" in name}


def published(table):
    return {
        name: (*row[:3], row[3].replace("prox_", "published_"), *row[4:])
        for name, row in table.items()
        if "_cg" in name
    }


@pytest.mark.parametrize(
    ("folder", "table", "poolings"),
    [
        ("paper", PAPER, 2),
        ("paper_published", published(PAPER), 2),
        ("paper_text", TEXT, 3),
        ("paper_text_published", published(TEXT), 3),
    ],
)
def test_paper_table(folder, table, poolings):
    configs = {path.stem: load_config(path) for path in (CONFIGS / folder).glob("*.yaml")}
    found = {
        stem: (
            config.model.name,
            config.optimizer.name,
            config.optimizer.lr,
            config.proxprop.optimization_mode,
            config.proxprop.tau_prox,
            config.epochs,
        )
        for stem, config in configs.items()
    }
    assert found == table
    for stem, config in configs.items():
        assert config.name == stem
        assert (config.data.name, config.data.train_samples) == ("cifar10", None)
        assert (config.batch_size, config.seed) == (500, 0)
        assert config.optimizer.weight_decay == 0
        if config.optimizer.name == "sgd":
            assert (config.optimizer.momentum, config.optimizer.nesterov) == (0.95, True)
            assert config.model.hidden_features == (4000, 1000, 4000)
        else:
            assert (config.model.channels, config.model.kernel_size) == ((16, 20, 20), 5)
            assert config.model.poolings == poolings
        if stem.endswith("gradient"):
            assert config.min_epochs == 50


def test_quick_holds_the_same_comparisons_on_digits():
    configs = {path.stem: load_config(path) for path in (CONFIGS / "quick").glob("*.yaml")}
    assert configs.keys() == PAPER.keys()
    for stem, config in configs.items():
        assert config.name == stem
        assert config.data.name == "digits"
        assert (config.model.name, config.optimizer.name) == PAPER[stem][:2]
        assert config.proxprop.optimization_mode == PAPER[stem][3]
