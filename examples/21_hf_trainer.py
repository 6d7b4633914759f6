"""
The Trainer of transformers
===========================

``optimizer_cls_and_kwargs`` takes any class; the Trainer makes the groups (norms do not decay). The losses are those of
the plain loop, bit for bit.
"""

import tempfile

import torch
from transformers import Trainer, TrainingArguments

import refopt_cuda as rc
from refopt_cuda.train import data, model

# %%
# The text, sample after sample
# -----------------------------

CONTEXT, BATCH, STEPS = 64, 8, 12
text = data.standard_library().data


class Samples(torch.utils.data.IterableDataset):
    def __iter__(self):
        for step in range(STEPS):
            at = data.starts(len(text), CONTEXT, BATCH, seed=0, step=step)
            for x, y in zip(*data.windows(text, at, CONTEXT)):
                yield {"input_ids": x, "labels": y}


# %%
# A model that returns its loss
# -----------------------------

losses = []


class WithLoss(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, input_ids, labels):
        loss = self.net.loss(input_ids, labels)
        losses.append(loss.item())
        return {"loss": loss}


net = model.build(model.Sizes(layers=2, width=64, heads=2, hidden=128, context=CONTEXT), seed=0)

# %%
# The Trainer
# -----------

with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        weight_decay=0.1,
        max_grad_norm=1.0,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(
        WithLoss(net),
        arguments,
        train_dataset=Samples(),
        optimizer_cls_and_kwargs=(rc.optim.AdamW8bit, {"lr": 3e-3}),
    )
    trainer.train()

print(", ".join(f"{loss:.3f}" for loss in losses))
assert losses[-1] < losses[0]
