"""FSDP2 with 8-bit states, saved by any number of ranks and gone on with by any other.

torchrun --nproc-per-node 2 examples/torchrun/fsdp2.py
torchrun --nproc-per-node 3 examples/torchrun/fsdp2.py    # goes on with what the two have saved
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import refopt_cuda as rc

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/fsdp2")
cuda = torch.cuda.is_available()
if cuda:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
device = "cuda" if cuda else "cpu"

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.GELU(), torch.nn.Linear(512, 256)).to(device)
for layer in (model[0], model[2], model):
    fully_shard(layer)
opt = rc.optim.AdamW8bit(model.parameters(), lr=1e-3, weight_decay=0.01)

saved = sorted(folder.glob("step*/.metadata"), key=lambda f: int(f.parent.name[4:]))
first = 0
if saved:  # a folder without .metadata was not finished
    parts = dict(zip(("model", "opt"), get_state_dict(model, opt), strict=True))
    dcp.load(parts, checkpoint_id=saved[-1].parent)
    set_state_dict(model, opt, model_state_dict=parts["model"], optim_state_dict=parts["opt"])
    first = int(saved[-1].parent.name[4:])

for step in range(first, first + 20):
    draw = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    x = torch.randn(16, 256, generator=draw).to(device)
    loss = (model(x) - x).square().mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    opt.step()
    opt.zero_grad()

codes = opt.state[model[0].weight]["m.codes"]
if dist.get_rank() == 0:
    print(f"steps {first} to {first + 20}: loss {loss.item():.4f}; codes {tuple(codes.shape)} {codes.placements}")
parts = dict(zip(("model", "opt"), get_state_dict(model, opt), strict=True))
dcp.save(parts, checkpoint_id=folder / f"step{first + 20}")
dist.destroy_process_group()
