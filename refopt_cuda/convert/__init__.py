"""Optimizer states of torch.optim, bitsandbytes, torchao, FlashOptim and transformers: taken over, and handed back.

`from_NAME(state_dict, opt)` gives what `opt.load_state_dict` takes; `to_NAME(opt)` what the other library's optimizer
takes. What can pass bit for bit does; what cannot is rounded once, and a warning says how many states and why; what has
no meaning on the other side is refused with a sentence. `refopt convert` does the same on files.
"""

from refopt_cuda.convert.bitsandbytes import from_bitsandbytes, to_bitsandbytes
from refopt_cuda.convert.factored import from_transformers, to_transformers
from refopt_cuda.convert.flashoptim import from_flashoptim, to_flashoptim
from refopt_cuda.convert.torch_optim import from_torch, to_torch
from refopt_cuda.convert.torchao import from_torchao, to_torchao

__all__ = [
    "from_bitsandbytes",
    "from_flashoptim",
    "from_torch",
    "from_torchao",
    "from_transformers",
    "to_bitsandbytes",
    "to_flashoptim",
    "to_torch",
    "to_torchao",
    "to_transformers",
]
