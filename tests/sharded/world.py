"""One rank among some: its mesh, how it cuts a whole tensor, and what it found."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from tests.sharded.cases import words

PATIENCE = timedelta(seconds=90)


@dataclass
class Report:
    """Comparisons by claim, and those that failed."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def compare(self, claim: str, got: torch.Tensor, want: torch.Tensor, what: str) -> None:
        """Count a comparison of bits."""
        self.counts[claim] += 1
        if got.shape != want.shape or got.dtype != want.dtype:
            self.wrong.append(f"{claim}: {what}: {got.dtype}{tuple(got.shape)} for {want.dtype}{tuple(want.shape)}")
        elif (bad := int((words(got) != words(want)).sum())) != 0:
            self.wrong.append(f"{claim}: {what}: {bad} bytes of {want.nbytes} differ")

    def holds(self, claim: str, true: bool, what: str) -> None:
        """Count a claim."""
        self.counts[claim] += 1
        if not true:
            self.wrong.append(f"{claim}: {what}")


@dataclass
class World:
    """All ranks of this process group in a row, and this one among them."""

    device: str
    report: Report = field(default_factory=Report)

    def __post_init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.mesh = init_device_mesh(self.device, (self.size,))
        self.kept: dict[Any, tuple[DTensor, torch.Tensor]] = {}
        self.rows: tuple[Placement, ...] = (Shard(0),)

    def cut(
        self, whole: torch.Tensor, mesh: DeviceMesh | None = None, placements: Sequence[Placement] | None = None
    ) -> DTensor:
        """A whole tensor as a DTensor; its part begins one element behind the start of its memory."""
        mesh, placements = mesh or self.mesh, tuple(placements or self.rows)
        part = piece(whole, mesh, placements)
        room = torch.zeros(part.numel() + 1, dtype=whole.dtype, device=self.device)
        mine = room[1:].view(part.shape).copy_(part)
        return DTensor.from_local(
            mine, mesh, placements, run_check=False, shape=whole.shape, stride=whole.contiguous().stride()
        )

    def gradient(self, whole: torch.Tensor, mesh: Any = None, placements: Any = None) -> DTensor:
        """As `cut`; kept, because every optimizer is given it."""
        key = id(whole), mesh, placements
        if key not in self.kept:
            self.kept[key] = self.cut(whole, mesh, placements), whole
        return self.kept[key][0]

    def parameter(
        self, whole: torch.Tensor, mesh: DeviceMesh | None = None, placements: Sequence[Placement] | None = None
    ) -> torch.nn.Parameter:
        """As FSDP2 has it: the part's memory begins at an aligned address."""
        cut = self.cut(whole, mesh, placements)
        mine = cut.to_local().clone()
        return torch.nn.Parameter(
            DTensor.from_local(
                mine, cut.device_mesh, cut.placements, run_check=False, shape=whole.shape, stride=cut.stride()
            )
        )

    def agrees(self, claim: str, p: Any, state: dict[str, Any], want: dict[str, Any], what: str) -> None:
        """Compare this rank's part of a parameter and of its states with those of the whole."""
        for key, value in ({"p": p} | state).items():
            if not isinstance(value, torch.Tensor):
                self.report.holds(claim, value == want[key], f"{what}: {key} is {value}, not {want[key]}")
            elif isinstance(value, DTensor):
                expected = piece(want[key], value.device_mesh, value.placements)
                self.report.compare(claim, value.detach().to_local(), expected, f"{what}: {key}")
            else:
                self.report.compare(claim, value, want[key], f"{what}: {key}")
        self.report.holds(claim, state.keys() == want.keys() - {"p"}, f"{what}: {sorted(state)} for {sorted(want)}")


def piece(whole: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> torch.Tensor:
    """This rank's part, by torch's own rule: `chunk`, along one dimension of the mesh after the other; those of
    fully_shard, whose placements are strided where tensor parallel layers are cut already, come last."""
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    cuts = [*zip(placements, coordinate, mesh.shape, strict=True)]
    for placement, at, size in sorted(cuts, key=lambda cut: type(cut[0]).__name__ == "_StridedShard"):
        if isinstance(placement, Replicate):
            continue
        assert placement.is_shard() or type(placement).__name__ == "_StridedShard"
        parts = torch.chunk(whole, size, placement.dim)
        whole = parts[at] if at < len(parts) else whole.narrow(placement.dim, 0, 0)
    return whole


def ranks(size: int, folder: Path, job: Callable[[World], None], limit: float = 300) -> list[Report | int]:
    """Run `job` in `size` forked processes on gloo: the report of each, or how it ended.

    The parent must have started no threads; it may have compiled what the ranks will need.
    """
    store, pipes, children = folder / f"store{len(list(folder.iterdir()))}", [], []
    for rank in range(size):
        receive, send = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(receive)
            _rank(rank, size, store, job, send)
        os.close(send)
        pipes.append(receive)
        children.append(child)
    out: list[Report | int] = []
    for receive, child in zip(pipes, children, strict=True):
        with os.fdopen(receive, "rb") as file:
            data = file.read()
        _, status = os.waitpid(child, 0)
        out.append(_read(data) if status == 0 else os.waitstatus_to_exitcode(status))
    return out


def _rank(rank: int, size: int, store: Path, job: Callable[[World], None], send: int) -> None:
    import pickle
    import traceback

    status = 1
    try:
        dist.init_process_group(
            "gloo", store=dist.FileStore(str(store), size), rank=rank, world_size=size, timeout=PATIENCE
        )
        world = World("cpu")
        job(world)
        with os.fdopen(send, "wb") as file:
            pickle.dump(world.report, file)
        dist.barrier()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _read(data: bytes) -> Report:
    import pickle

    return pickle.loads(data)
