"""A LightningModule trains with EPOptimizer under manual optimization."""

import pytest
import torch
from torch import nn

import mep

lightning = pytest.importorskip("lightning.pytorch", reason="needs the `lightning` extra")

pytestmark = [
    # One process, no workers, logging off: advice on all three is beside the point here.
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),  # Lightning's own use of a torch function
]


class Module(lightning.LightningModule):
    """Three ways to write a training step; all are what a user would write."""

    def __init__(self, route):
        super().__init__()
        self.automatic_optimization = False
        self.route = route
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        self.losses = []

    def configure_optimizers(self):
        return mep.EPOptimizer(self.net.parameters(), model=self.net, lr=0.2, momentum=0.9)

    def training_step(self, batch, batch_idx):
        x, y = batch
        opt = self.optimizers()
        if self.route == "unwrapped":
            loss = opt.optimizer.step(x=x, target=y)
        elif self.route == "estimate":
            opt.zero_grad()
            loss = mep.estimate(self.net, x, y).loss
            opt.step()
        else:
            loss = opt.step(x=x, target=y)
        self.losses.append(float(loss))


def loader():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(48, 4, generator=generator)
    data = torch.utils.data.TensorDataset(x, x[:, :3].argmax(1))
    return torch.utils.data.DataLoader(data, batch_size=16)


def fit(module, folder, epochs=8):
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, loader())
    return trainer


def by_hand(epochs=8):
    module = Module("by hand")
    opt = module.configure_optimizers()
    for _ in range(epochs):
        for x, y in loader():
            opt.step(x=x, target=y)
    return module.net


@pytest.mark.parametrize("route", ["unwrapped", "estimate"])
def test_module_trains_as_by_hand(route, tmp_path):
    module = Module(route)
    fit(module, tmp_path)
    assert sum(module.losses[-3:]) < 0.3 * sum(module.losses[:3])
    for ours, plain in zip(module.net.parameters(), by_hand().parameters(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    assert list(tmp_path.iterdir()) == []


def test_lightning_counts_only_steps_of_its_wrapper(tmp_path):
    """What counts steps (`max_steps`, checkpoints every n steps) needs the estimate's way."""
    assert fit(Module("estimate"), tmp_path, epochs=2).global_step == 6
    assert fit(Module("unwrapped"), tmp_path, epochs=2).global_step == 0


def test_wrapped_step_on_a_batch_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(ValueError, match=r"no closure.*Lightning.*opt\.optimizer\.step"):
        fit(Module("wrapped"), tmp_path, epochs=1)
