"""The code in the documentation runs and prints what it says; with other libraries it takes the steps it should."""

import copy
import csv
import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

DOCS = Path(__file__).parents[2] / "docs"
README = DOCS.parent / "README.md"
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", re.DOTALL)
PAGES = (README, DOCS / "your_model.md", DOCS / "deferred.md", DOCS / "own_layer.md")
BLOCKS = [
    pytest.param(*found, id=f"{page.name}-{index}")
    for page in PAGES
    for index, found in enumerate(BLOCK.findall(page.read_text()))
]
BATCH, PARTS = 128, 4


# Of lightning and accelerate, about what they import.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}")
    for kind in ("DeprecationWarning", "FutureWarning", "PendingDeprecationWarning", "UserWarning:lightning")
]


@pytest.fixture
def one_process(monkeypatch):
    """As torchrun starts it."""
    for key, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(key, value)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(("code", "printed"), BLOCKS)
def test_the_code_runs_and_prints_what_the_page_says(code, printed, capsys):
    assert len(code.splitlines()) <= 20
    exec(compile(code, "documentation", "exec"), {})
    assert capsys.readouterr().out == printed


def code_that_has(text):
    (code,) = [block.values[0] for block in BLOCKS if text in block.values[0]]
    return code


def test_the_layer_of_windows_takes_the_step_that_its_plain_form_has():
    names = {}
    exec(compile(code_that_has("class CausalConv"), "documentation", "exec"), names)
    torch.manual_seed(0)
    layer = names["CausalConv"](3, 8, width=4, tau_prox=0.5, optimization_mode="prox_exact").double()
    x, seed = torch.randn(2, 10, 3).double(), torch.randn(2, 10, 8).double()
    layer(x).backward(seed)
    earlier = [torch.roll(x, shift, 1).index_fill_(1, torch.arange(shift), 0) for shift in (3, 2, 1, 0)]
    rows = torch.cat([torch.stack(earlier, -1).flatten(2), torch.ones(2, 10, 1).double()], -1).flatten(0, 1)
    system = rows.T @ rows + 2 * torch.eye(13).double()
    d = torch.linalg.solve(system, rows.T @ seed.flatten(0, 1))
    torch.testing.assert_close(layer.weight.grad, d[:-1].T)
    torch.testing.assert_close(layer.bias.grad, d[-1])


def plain_steps(network, inputs, targets):
    """Of whole batches, with SGD at learning rate 0.1; every layer solves at once."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for x, y in zip(inputs.split(BATCH), targets.split(BATCH), strict=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def test_lightning_takes_the_step_of_the_accumulated_batch():
    import lightning

    names = {}
    exec(compile(code_that_has("LightningModule"), "documentation", "exec"), names)
    torch.manual_seed(0)
    module = names["Classifier"]()
    inputs, targets = torch.randn(2 * BATCH, 20), torch.randint(3, (2 * BATCH,))
    expected = plain_steps(copy.deepcopy(module.network), inputs, targets)
    data = torch.utils.data.TensorDataset(inputs, targets)
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "barebones"), False
    )
    trainer = lightning.Trainer(
        max_epochs=1, accumulate_grad_batches=PARTS, gradient_clip_val=1e6, accelerator="cpu", devices=1, **quiet
    )
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=BATCH // PARTS))
    actual = torch.cat([p.detach().flatten() for p in module.network.parameters()])
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_accelerate_takes_the_step_of_the_accumulated_batch():
    code = code_that_has("accelerate")
    for shown, tested in (
        ("optimizer = torch", "start = copy.deepcopy(model)\noptimizer = torch"),
        ("torch.randn(8, 32, 20), torch.randint(3, (8, 32))", "inputs.split(32), targets.split(32)"),
    ):
        assert shown in code
        code = code.replace(shown, tested)
    torch.manual_seed(0)
    names = {"copy": copy, "inputs": torch.randn(2 * BATCH, 20), "targets": torch.randint(3, (2 * BATCH,))}
    exec(compile(code, "documentation", "exec"), names)
    expected = plain_steps(names["start"], names["inputs"], names["targets"])
    actual = torch.cat([p.detach().flatten() for p in names["model"].parameters()])
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_the_table_of_resnet18_is_that_of_the_recorded_runs():
    text = (DOCS / "your_model.md").read_text()
    runs = DOCS.parent / "results" / "cpu-resnet18"
    folders = sorted(path.parent for path in runs.glob("epoch_*/*/summary.json"))
    assert len(folders) == 4
    for folder in folders:
        *_, last = csv.DictReader((folder / "metrics.csv").read_text().splitlines())
        test = json.loads((folder / "summary.json").read_text())["test_accuracy"]
        numbers = f"| {float(last['train_loss']):.3f} | {float(last['val_accuracy']):.1%} | {test:.1%} |"
        assert numbers.replace("%", " %") in text, folder
