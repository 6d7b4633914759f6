"""transformers' Trainer with FSDP2: the class and its arguments are handed over, because the model is sharded first.

torchrun --nproc-per-node 2 examples/torchrun/trainer.py    # pip install transformers accelerate
"""

import os
import sys

import torch
from torch.distributed.tensor import DTensor
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import refopt_cuda as rc


def bytes_here(x: torch.Tensor) -> int:
    """Of a tensor, or of this rank's part of a sharded one."""
    return (x.to_local() if isinstance(x, DTensor) else x).nbytes


class Numbers(torch.utils.data.Dataset):
    """Sequences that count up: soon learnt."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, k: int) -> dict[str, torch.Tensor]:
        tokens = (torch.arange(32) + k) % 64
        return {"input_ids": tokens, "labels": tokens}


torch.manual_seed(0)
config = GPT2Config(vocab_size=64, n_positions=32, n_embd=128, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
model = GPT2LMHeadModel(config)
arguments = TrainingArguments(
    output_dir=sys.argv[1] if len(sys.argv) > 1 else "runs/trainer",
    per_device_train_batch_size=8,
    max_steps=int(os.environ.get("STEPS", 12)),
    logging_steps=4,
    save_steps=8,
    report_to=[],
    use_cpu=not torch.cuda.is_available(),
    fsdp="full_shard auto_wrap",  # on GPUs; without one accelerate trains replicas
    fsdp_config={"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["GPT2Block"]},
)
adamw = rc.optim.AdamW8bit, {"lr": 3e-3, "weight_decay": 0.01}
trainer = Trainer(model, arguments, train_dataset=Numbers(), optimizer_cls_and_kwargs=adamw)
trainer.train()
kept = [x for state in trainer.optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
print(f"rank {os.environ.get('RANK', 0)}: {sum(map(bytes_here, kept)):,} bytes of states here")
