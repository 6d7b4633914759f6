"""`refopt train --sharded` under torchrun: FSDP2 shards weights, gradients and states; each rank has part of a batch.

All ranks draw the same batch and step on their own sequences of it, so a run differs from that of one device by the
order in which gradients are summed. Checkpoints are torch.distributed.checkpoint folders, which any number of ranks
loads; rank 0 alone prints, and writes all other files.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from refopt_cuda.train import loop
from refopt_cuda.train.errors import InputError
from refopt_cuda.train.model import build

LATEST = "latest.json"


def begin(device: str | None) -> int:
    """Join the ranks that torchrun started; how many there are. Raises InputError where it started none."""
    if "RANK" not in os.environ:
        raise InputError("--sharded needs torchrun: torchrun --nproc-per-node N -m refopt train --sharded ...")
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    return dist.get_world_size()


def first() -> bool:
    """Whether this process prints and writes: rank 0, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def same(make: Callable[[], Any]) -> Any:
    """What `make` gives on rank 0, on every rank; its InputError is raised on every rank."""
    found: list[Any] = [None, None]
    if first():
        try:
            found[0] = make()
        except InputError as error:
            found[1] = str(error)
    dist.broadcast_object_list(found, device=torch.device("cpu"))
    if found[1] is not None:
        raise InputError(found[1])
    return found[0]


def end() -> None:
    """Leave the other ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()


class Run(loop.Run):
    """A run whose model is sharded over all ranks. The reference takes no step again: no rank has whole tensors."""

    def start(self) -> None:
        """The model with its first weights, sharded block by block, or all that the newest checkpoint holds."""
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.mesh = init_device_mesh(self.plan.device, (self.ranks,))
        self.model = build(self.plan.sizes, self.seed, "cpu", self.subject.dtype)
        for block in self.model.blocks:
            fully_shard(block, mesh=self.mesh)
        fully_shard(self.model, mesh=self.mesh)
        self.model.to(self.plan.device)
        states = self.folder / "states"
        if self.rank == 0:
            shutil.rmtree(states, ignore_errors=True)  # the checkpoint holds them, at its own step
        dist.barrier()
        self.opt = self.subject.make(self.model.parameters(), self.plan.lr, self.plan.place, states)
        self.params = [p for g in self.opt.param_groups for p in g["params"]]
        self._load()

    def _parts(self) -> dict[str, Any]:
        return {
            "model": states.get_model_state_dict(self.model),
            "optimizer": states.get_optimizer_state_dict(self.model, self.opt),
        }

    def _load(self) -> None:
        latest = self.folder / LATEST
        if not latest.exists():
            return
        saved = json.loads(latest.read_text("utf-8"))
        parts = self._parts()
        dcp.load(parts, checkpoint_id=self.folder / saved["folder"])
        states.set_model_state_dict(self.model, parts["model"])
        states.set_optimizer_state_dict(self.model, self.opt, parts["optimizer"])
        self.record = loop.Record(**saved["record"])

    def save(self) -> None:
        """A folder a checkpoint; the file that names the newest is replaced when that one is whole."""
        name = f"step{self.record.step}"
        dcp.save(self._parts(), checkpoint_id=self.folder / name)
        if self.rank == 0:
            new = self.folder / (LATEST + ".new")
            new.write_text(json.dumps({"folder": name, "record": asdict(self.record)}), "utf-8")
            new.replace(self.folder / LATEST)
        dist.barrier()

    def _mine(self, at: np.ndarray) -> np.ndarray:
        return at[self.rank :: self.ranks]

    def _mean(self, loss: torch.Tensor) -> float:
        total = loss.detach().clone()
        dist.all_reduce(total)
        return float(total) / self.ranks

    def _agreed(self, flag: bool) -> bool:
        """Whether any rank says so."""
        said = torch.tensor(int(flag))
        dist.all_reduce(said, dist.ReduceOp.MAX)
        return bool(said)

    def _replay(self, step: int) -> None:
        return None
