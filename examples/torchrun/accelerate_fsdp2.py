"""accelerate with FSDP2: the optimizer is built over whole parameters, `prepare` puts shards in their place.

torchrun --nproc-per-node 2 examples/torchrun/accelerate_fsdp2.py    # pip install accelerate
"""

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor

import refopt_cuda as rc


class Copy(torch.nn.Module):
    """Learns to give back what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.GELU(), torch.nn.Linear(512, 256))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.layers(x) - x).square().mean()


cuda = torch.cuda.is_available()
plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=10_000)
accelerator = Accelerator(fsdp_plugin=plugin, cpu=not cuda)  # without a GPU accelerate trains replicas
torch.manual_seed(0)
model = Copy()
opt = rc.optim.AdamW8bit(model.parameters(), lr=1e-3, weight_decay=0.01)
data = torch.utils.data.DataLoader(torch.randn(640, 256), batch_size=16)
model, opt, data = accelerator.prepare(model, opt, data)
for x in data:
    loss = model(x)
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    opt.step()
    opt.zero_grad()
states = [x for entry in opt.state.values() for x in entry.values() if isinstance(x, torch.Tensor)]
shards = sum(isinstance(x, DTensor) for x in states)
accelerator.print(f"loss {loss.item():.4f}; {shards} of {len(states)} tensors of states are sharded")
accelerator.end_training()
