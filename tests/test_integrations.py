"""Libraries that take a model apart, train it, or build layers themselves, meet fastseq's: Captum,
Opacus, Lightning, torchrl and pytorch-forecasting.

None of them is needed otherwise: ``make integration`` installs them and runs these tests.
"""

import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import clients
import pytest
import torch
from torch import nn

import fastseq

#: What the libraries are warned of by torch is theirs; what comes from fastseq fails as elsewhere.
pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.filterwarnings("error:::fastseq"),
]

BACKENDS = ("numba", "eager", "torch", None)
T, B, I, H, CLASSES = 6, 8, 5, 8, 2  # noqa: E741  (the field's letter)


class Classifier(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(H, CLASSES)

    def forward(self, x):
        output = self.layer(x)
        output = output[0] if isinstance(output, tuple) else output
        return self.head(output[:, -1])


def classifier(cell="LSTM", **options):
    torch.manual_seed(0)
    return Classifier(getattr(fastseq, cell)(I, H, batch_first=True, **options))


def data(rows=B, seed=1):
    """Sequences, and whether their numbers add up to more than 0."""
    x = torch.randn(rows, T, I, generator=torch.Generator().manual_seed(seed))
    return x, (x.sum((1, 2)) > 0).long()


# --- Captum


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_captum_explains_by_gradients(cell, backend):
    """Integrated gradients add up to what they explain."""
    attr = pytest.importorskip("captum.attr")
    model, (x, _) = classifier(cell, backend=backend), data()
    model.eval()
    found = attr.IntegratedGradients(model).attribute(x, target=1, n_steps=100)
    change = model(x)[:, 1] - model(torch.zeros_like(x))[:, 1]
    torch.testing.assert_close(found.sum((1, 2)).float(), change, rtol=1e-2, atol=1e-3)
    slope = attr.Saliency(model).attribute(x, target=1, abs=False)
    x.requires_grad_()
    assert torch.equal(slope, torch.autograd.grad(model(x)[:, 1].sum(), x)[0])


def test_captum_explains_by_leaving_out():
    attr = pytest.importorskip("captum.attr")
    model, (x, _) = classifier("GRU"), data()
    model.eval()
    found = attr.FeatureAblation(model).attribute(x, target=0)
    without = x.clone()
    without[:, 2, 3] = 0
    with torch.no_grad():
        change = model(x)[:, 0] - model(without)[:, 0]
    torch.testing.assert_close(found[:, 2, 3], change)


def test_captum_explains_the_embedding():
    attr = pytest.importorskip("captum.attr")
    embedding = nn.Embedding(10, I)
    model = nn.Sequential(embedding, classifier("LSTM")).eval()
    letters = torch.arange(12).reshape(2, T) % 10
    found = attr.LayerIntegratedGradients(model, embedding).attribute(letters, target=1)
    assert found.shape == (2, T, I) and found.isfinite().all() and found.any()


# --- Opacus


class OutputOnly(fastseq.LSTM):
    """Opacus multiplies what a layer returns by its gradient, so that has to be one tensor."""

    def forward(self, x):
        return super().forward(x)[0]


@pytest.mark.parametrize("backend", ["numba", "eager", None])
@pytest.mark.parametrize("mode", ["hooks", "functorch"])
def test_opacus_finds_the_gradients_of_each_sample(mode, backend):
    grad_sample = pytest.importorskip("opacus.grad_sample")
    torch.manual_seed(0)
    model = Classifier(OutputOnly(I, H, batch_first=True, num_layers=2, backend=backend))
    plain = deepcopy(model)
    wrapped = grad_sample.wrap_model(model, grad_sample_mode=mode)
    x, y = data()
    nn.functional.cross_entropy(wrapped(x), y).backward()
    found = {name: p.grad_sample for name, p in model.named_parameters()}
    for row in range(B):
        loss = nn.functional.cross_entropy(plain(x[row : row + 1]), y[row : row + 1])
        names, parameters = zip(*plain.named_parameters(), strict=True)
        for name, expected in zip(names, torch.autograd.grad(loss, parameters), strict=True):
            torch.testing.assert_close(found[name][row], expected, rtol=1e-4, atol=1e-6)


def test_opacus_wants_one_tensor_of_a_layer():
    """The limit that the pages name: of a layer as it is, Opacus cannot tell output from state."""
    grad_sample = pytest.importorskip("opacus.grad_sample")
    wrapped = grad_sample.GradSampleModule(classifier())
    x, y = data()
    loss = nn.functional.cross_entropy(wrapped(x), y)
    with pytest.raises(TypeError):
        loss.backward()


def test_opacus_trains():
    opacus = pytest.importorskip("opacus")
    torch.manual_seed(0)
    model = Classifier(OutputOnly(I, H, batch_first=True))
    x, y = data(128)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=32)
    private, optimizer, loader = opacus.PrivacyEngine(accountant="rdp").make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        data_loader=loader,
        noise_multiplier=0.3,
        max_grad_norm=1.0,
    )
    with torch.no_grad():
        before = nn.functional.cross_entropy(model(x), y).item()
    for _ in range(8):
        for rows, wanted in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(private(rows), wanted).backward()
            optimizer.step()
    with torch.no_grad():
        assert nn.functional.cross_entropy(private(x), y).item() < 0.8 * before


# --- Lightning


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_lightning_trains_as_a_loop_does(cell, tmp_path):
    lightning = pytest.importorskip("lightning")
    x, y = data(32)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)

    class Task(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = classifier(cell, num_layers=2)

        def training_step(self, batch):
            rows, wanted = batch
            return nn.functional.cross_entropy(self.model(rows), wanted)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.05)

    task = Task()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=3,
        gradient_clip_val=0.5,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[lightning.pytorch.callbacks.ModelCheckpoint(dirpath=tmp_path, save_last=True)],
    )
    trainer.fit(task, loader)

    model = classifier(cell, num_layers=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(3):
        for rows, wanted in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(rows), wanted).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
    for found, expected in zip(task.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    again = Task()
    again.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    assert torch.equal(again.model(x), task.model(x))


def test_lightning_in_lower_precision_and_its_summary(tmp_path):
    lightning = pytest.importorskip("lightning")
    x, y = data(32)
    losses = []

    class Task(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = classifier("GRU")
            self.example_input_array = x[:2]

        def forward(self, rows):
            return self.model(rows)

        def training_step(self, batch):
            rows, wanted = batch
            logits = self(rows)
            losses.append(logits.dtype)
            return nn.functional.cross_entropy(logits, wanted)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.05)

    task = Task()
    summary = lightning.pytorch.utilities.model_summary.ModelSummary(task, max_depth=2)
    assert summary.total_parameters == sum(p.numel() for p in task.parameters())
    trainer = lightning.Trainer(
        accelerator="cpu",
        precision="bf16-mixed",
        max_steps=3,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(task, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 8))
    assert losses == [torch.bfloat16] * 3


# --- torchrl and pytorch-forecasting, which make their own layers, and ask isinstance of them

PACKAGES = {"torchrl": "torchrl", "forecasting": "pytorch_forecasting"}


def client(name):
    """A model of a library, and what it computes with torch.nn's layers."""
    pytest.importorskip(PACKAGES[name.partition("_")[0]])
    run, kind = clients.CLIENTS[name]
    layer, expected = run(kind, lambda model: None)
    assert not isinstance(layer, fastseq.nn.Recurrent)
    return lambda turn: run(kind, turn), expected


def agree(found, expected):
    for mine, yours in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, yours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", clients.CLIENTS)
def test_clients_after_replace_with_compat(name):
    run, expected = client(name)
    reports = []
    layer, found = run(lambda model: reports.append(fastseq.replace(model, compat=True)))
    agree(found, expected)
    if name.startswith("torchrl"):
        assert isinstance(layer, fastseq.nn.Recurrent) and not reports[0].left
    else:  # a subclass is left, and the report says what would turn it
        (reason,) = reports[0].left.values()
        assert reason.startswith("pytorch_forecasting.models.nn.rnn.")
        assert "fastseq.install() before" in reason


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_torchrl_asks_isinstance(kind):
    """Without compat=True its modules take another way, which the report tells beforehand."""
    run, _ = client(f"torchrl_module-{kind}")
    reports = []
    with pytest.raises(TypeError, match="mask"):
        run(lambda model: reports.append(fastseq.replace(model)))
    assert f"isinstance(..., nn.{kind}) stands in {kind}Module." in str(reports[0])


@pytest.mark.parametrize("name", clients.CLIENTS)
def test_clients_after_install(name, tmp_path):
    _, expected = client(name)
    script, out = Path(clients.__file__), tmp_path / "found.pt"
    done = subprocess.run(
        [sys.executable, str(script), name, str(out)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    agree(torch.load(out), expected)
