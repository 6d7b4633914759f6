"""Three lanes of work and events between them: copies in, steps, copies out. The same schedule runs on either kind.

Work of one lane is done in the order in which it was given; a lane that waits for an event goes on when the work before
its last `record` is done. `HostLanes` does everything at once, in memory; `CudaLanes` has a stream for each direction
of the link, so that both are busy while kernels run on the caller's stream.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

IN, STEP, OUT = range(3)
PORTABLE = 1
"""cudaHostRegisterPortable: pinned for every device."""


class Lanes(Protocol):
    """What a schedule is made of. Addresses are numbers; sizes are bytes."""

    def begin(self, stream: int) -> None:
        """Steps given from now on go to this stream (a cudaStream_t)."""

    def stream(self, lane: int) -> int:
        """The cudaStream_t that does a lane's work; 0 where there is none."""

    def copy(self, lane: int, to: int, source: int, size: int) -> None: ...

    def run(self, call: Callable[[], Any]) -> None:
        """In the lane of steps."""

    def event(self) -> Any: ...

    def record(self, lane: int, event: Any) -> None: ...

    def wait(self, lane: int, event: Any) -> None: ...

    def meet(self, event: Any) -> None:
        """The host waits until what was recorded is done."""

    def flush(self) -> None:
        """What steps write may be read by whoever works in the order of the caller's stream."""

    def finish(self) -> None:
        """Wait until all that was given is done."""

    def pin(self, address: int, size: int) -> None: ...

    def unpin(self, address: int) -> None: ...


class Place:
    """Room for one page, and the events of what last happened to it."""

    def __init__(self, address: int, lanes: Lanes) -> None:
        self.address = address
        self.loaded, self.stepped, self.stored = (lanes.event() for _ in range(3))


class HostLanes:
    """Everything is done when it is given."""

    def begin(self, stream: int) -> None: ...

    def stream(self, lane: int) -> int:
        return 0

    def copy(self, lane: int, to: int, source: int, size: int) -> None:
        ctypes.memmove(to, source, size)

    def run(self, call: Callable[[], Any]) -> None:
        call()

    def event(self) -> Any:
        return None

    def record(self, lane: int, event: Any) -> None: ...

    def wait(self, lane: int, event: Any) -> None: ...

    def meet(self, event: Any) -> None: ...

    def flush(self) -> None: ...

    def finish(self) -> None: ...

    def pin(self, address: int, size: int) -> None: ...

    def unpin(self, address: int) -> None: ...


@cache
def _streams(device: int, pair: int) -> tuple[Any, Any]:
    """Of copies in and out; all optimizers of a device share each pair."""
    import cupy

    with cupy.cuda.Device(device):
        return cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream(non_blocking=True)


class CudaLanes:
    """Streams and events of one CUDA device, which must be current when they are used."""

    def __init__(self, device: int, pair: int = 0) -> None:
        import cupy

        self.device, self._cuda, self._run = device, cupy.cuda, cupy.cuda.runtime
        self._streams = _streams(device, pair)
        self.handles = [self._streams[0].ptr, 0, self._streams[1].ptr]
        self._kinds = [self._run.memcpyHostToDevice, self._run.memcpyDeviceToDevice, self._run.memcpyDeviceToHost]

    def begin(self, stream: int) -> None:
        self.handles[STEP] = stream

    def stream(self, lane: int) -> int:
        return int(self.handles[lane])

    def copy(self, lane: int, to: int, source: int, size: int) -> None:
        self._run.memcpyAsync(to, source, size, self._kinds[lane], self.handles[lane])

    def run(self, call: Callable[[], Any]) -> None:
        call()

    def event(self) -> Any:
        with self._cuda.Device(self.device):
            return self._cuda.Event(disable_timing=True)

    def record(self, lane: int, event: Any) -> None:
        self._run.eventRecord(event.ptr, self.handles[lane])

    def wait(self, lane: int, event: Any) -> None:
        self._run.streamWaitEvent(self.handles[lane], event.ptr)

    def meet(self, event: Any) -> None:
        event.synchronize()

    def flush(self) -> None: ...

    def finish(self) -> None:
        for stream in self._streams:
            stream.synchronize()

    def pin(self, address: int, size: int) -> None:
        self._run.hostRegister(address, size, PORTABLE)

    def unpin(self, address: int) -> None:
        try:
            with self._cuda.Device(self.device):
                self._run.deviceSynchronize()  # a copy may still read it
                self._run.hostUnregister(address)
        except self._run.CUDARuntimeError:
            pass  # the driver is shutting down: it has unregistered everything


def lanes_of(kind: str, device: int, pair: int = 0) -> Lanes:
    """The lanes for tensors on a device of this kind, "cpu" or "cuda"; copies of other pairs are not in their way."""
    return CudaLanes(device, pair) if kind == "cuda" else HostLanes()
