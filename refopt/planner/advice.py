"""Which of the set-ups that fit to take, why, and what changes for someone who comes from AdamW.

What fits is ordered by what is given up beside AdamW with float32 states and float32 weights, in points: the table
below. It is an opinion, written down so that it can be argued with; the bytes and times are none.
"""

from __future__ import annotations

from refopt.planner.setups import Setup

METHOD = {"full": 0, "lora": 10, "qlora": 12}
WEIGHTS = {"f32": 0, "bf16_rem16": 0, "bf16_ecc": 1, "bf16_sr": 2, "bf16": 7}
STATES = {"f32": 0, "dynamic8": 1, "fp8": 3, "q4": 4}
RULE = {"adamw": 0, "lion": 3, "ademamix": 3, "adam_mini": 4, "lamb": 4, "adafactor": 5, "came": 5}
RULE |= {"muon": 5, "galore": 6, "apollo": 6, "sm3": 8}
PLACE = {"resident": 0, "paged": 2, "host": 5}
RELEASE = 2

GIVEN_UP = {
    "bf16_ecc": "weights of 24 bits",
    "bf16_sr": "weights of 16 bits, rounded by chance so that small steps are not lost",
    "bf16": "weights of 16 bits, which small steps do not move",
    "dynamic8": "states of 8 bits",
    "fp8": "states as 8-bit floats",
    "q4": "states of 4 bits",
    "paged": "states in host memory, which pass over the link in every step",
    "host": "the step on the host's cores",
    "lora": "adapters alone train",
    "qlora": "adapters alone train, over weights of 4 bits",
}
CHANGES = {
    "lion": "lr: a third to a tenth of AdamW's; weight_decay: three to ten times as much, so that lr * weight_decay "
    "stays; betas (0.9, 0.99); batches of 64 or more serve it best",
    "ademamix": "beta3 = 0.9999 and alpha = 8 with their warm-ups (t_beta3, t_alpha: the length of the run)",
    "adafactor": "lr=None follows the schedule of its paper; with an lr of your own set relative_step=False, "
    "scale_parameter=False and start from 1e-3; no first moment unless beta1 is given",
    "came": "lr: half to nine tenths of AdamW's; betas (0.9, 0.999, 0.9999)",
    "adam_mini": "lr, betas and weight_decay stay; queries and keys share second moments by heads in its paper: a "
    'group with blocks="heads", heads=N',
    "lamb": "lr is the share of a tensor's norm that a step moves it by; made for batches of thousands",
    "sm3": "lr as Adagrad's: steps shrink with the root of their number, and no schedule need do so; momentum 0.9",
    "muon": 'lr and weight_decay stay with adjust_lr_fn="match_rms_adamw"; AdamW beside it for embedding, head and '
    "vectors; serves models best that were trained with it before",
    "galore": "lr: four to eight times AdamW's, as scale=0.25 and the projection shorten steps; rank and "
    "update_proj_gap; AdamW beside it for embedding, head and vectors",
    "apollo": "lr: twice to six times AdamW's, as a channel is as long as its projection says; rank, scale; AdamW "
    "beside it for embedding, head and vectors",
    "lora": "lr: ten times that of full fine-tuning, 2e-4 for 7B to 13B; no weight_decay; every linear layer",
    "qlora": "lr 2e-4 for 7B to 13B, 1e-4 above; no weight_decay; max_grad_norm 0.3, as in its paper",
    "release": "no clipping by the joint norm and no GradScaler; gradients over several passes inside "
    "`with stepper.accumulate():`",
    "host": "a step waits for the host: raise the batch, not the number of steps",
}


def points(s: Setup) -> int:
    """What is given up, 0 for nothing."""
    weights = 0 if s.method != "full" else WEIGHTS[s.weights]
    return METHOD[s.method] + weights + STATES[s.codec] + RULE[s.rule] + PLACE[s.place] + RELEASE * s.release


def given_up(s: Setup) -> list[str]:
    """The same in words."""
    keys = [s.method] + ([s.weights] if s.method == "full" else []) + [s.codec, s.place]
    words = [GIVEN_UP[key] for key in keys if key in GIVEN_UP]
    rule = [] if s.rule == "adamw" else [f"another rule than AdamW: {s.rule}"]
    return words + rule + (["gradients that nobody sees: each is stepped and dropped"] if s.release else [])


def changes(s: Setup) -> list[str]:
    """Hyper-parameters and habits to change for someone who comes from AdamW."""
    keys = [s.method, s.rule, s.place] + (["release"] if s.release else [])
    return [f"{key}: {CHANGES[key]}" for key in keys if key in CHANGES]
