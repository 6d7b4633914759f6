"""What torch.compile leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def eager(function: Callable) -> Callable:
    """The same function, a break in the graph wherever torch.compile meets it: it looks at addresses and launches
    kernels of its own. The compiler is imported when it first runs; torch.optim's constructor has done so before.
    """

    @wraps(function)
    def outside(*args: Any, **words: Any) -> Any:
        disabled = getattr(function, "_outside_of_graphs", None)
        if disabled is None:
            disabled = torch.compiler.disable(function)
            function._outside_of_graphs = disabled  # type: ignore[attr-defined]
        return disabled(*args, **words)

    return outside
