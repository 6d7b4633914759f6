"""Lightning's ModelParallelStrategy: `configure_model` shards, `configure_optimizers` names the class.

torchrun --nproc-per-node 2 examples/torchrun/lightning_fsdp2.py    # pip install lightning
"""

import os
import sys

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

import refopt_cuda as rc


class Copy(L.LightningModule):
    """Learns to give back what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.GELU(), torch.nn.Linear(512, 256))

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for layer in (self.layers[0], self.layers[2]):
            fully_shard(layer, mesh=mesh)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return rc.optim.AdamW8bit(self.parameters(), lr=1e-3, weight_decay=0.01)

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        return (self.layers(batch) - batch).square().mean()


L.seed_everything(0)
folder = sys.argv[1] if len(sys.argv) > 1 else "runs/lightning"
devices = int(os.environ.get("WORLD_SIZE", 1))
trainer = L.Trainer(
    strategy=ModelParallelStrategy(tensor_parallel_size=1, data_parallel_size=devices),
    accelerator="cuda" if torch.cuda.is_available() else "cpu",
    devices=devices,
    max_steps=20,
    default_root_dir=folder,
    enable_progress_bar=False,
    logger=False,
)
trainer.fit(Copy(), torch.utils.data.DataLoader(torch.randn(320, 256), batch_size=16))
