"""
Lightning
=========

``configure_optimizers`` returns our optimizer; Lightning calls its step with a closure. The losses are those of the
plain loop, bit for bit.
"""

import logging
import warnings

import lightning
import torch

import refopt_cuda as rc
from refopt_cuda.train import data, model

# %%
# The text, batch after batch
# ---------------------------

CONTEXT, BATCH, STEPS = 64, 8, 12
text = data.standard_library().data


class Batches(torch.utils.data.IterableDataset):
    def __iter__(self):
        for step in range(STEPS):
            at = data.starts(len(text), CONTEXT, BATCH, seed=0, step=step)
            yield data.windows(text, at, CONTEXT)


# %%
# The module
# ----------
# Lightning would clip the gradients in the order of the optimizer's groups; in the model's order the norm has the bits
# of the plain loop.

losses = []


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = model.build(model.Sizes(layers=2, width=64, heads=2, hidden=128, context=CONTEXT), seed=0)

    def training_step(self, batch):
        loss = self.net.loss(*batch)
        losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        groups = rc.optim.groups(self.net, {"*norm*": {"weight_decay": 0.0}})
        return rc.optim.AdamW8bit(groups, lr=3e-3, weight_decay=0.1)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)


# %%
# The Trainer
# -----------

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")
trainer = lightning.Trainer(
    accelerator="cpu",
    devices=1,
    max_steps=STEPS,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(Module(), torch.utils.data.DataLoader(Batches(), batch_size=None))

print(", ".join(f"{loss:.3f}" for loss in losses))
assert losses[-1] < losses[0]
