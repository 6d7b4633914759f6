"""Every snippet of `refopt plan` builds its optimizer on a toy model; those of each kind also take a step."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from refopt.planner import Setup
from refopt.planner.setups import setups
from refopt.planner.snippet import snippet

torch = pytest.importorskip("torch", reason="snippets are for torch")
pytest.importorskip("peft", reason="adapters beside plain weights are peft's")

BACKWARD = "model(**batch).loss.backward()"
STEPPED = (
    Setup("full", "f32", "AdamW"),
    Setup("full", "f32", "AdamW", "paged"),
    Setup("full", "f32", "AdamW", release=True),
    Setup("lora", "bf16", "AdamW"),
    Setup("full", "f32", "Muon"),
    Setup("full", "bf16", "APOLLO-Mini", release=True),
)
"""Few kernels: what each class computes is tested elsewhere."""


@cache
def toy() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=128, use_cache=False))


def run(s: Setup, step: bool) -> dict[str, Any]:
    """What a snippet leaves behind."""
    ids = torch.arange(8)[None]
    known = {"model": copy.deepcopy(toy()), "batch": {"input_ids": ids, "labels": ids}}
    code = snippet(s, rank=4, directions=16)
    assert BACKWARD in code
    exec(code if step else code.partition(BACKWARD)[0], known)
    return known


@pytest.mark.filterwarnings("ignore")
def test_every_snippet_builds_the_optimizer_that_it_names() -> None:
    for s in (s for s in setups() if s.method != "qlora"):
        known = run(s, step=False)
        made = known["stepper"].optimizers if s.release else [known["opt"], *filter(None, [known.get("rest")])]
        assert {type(opt).__name__ for opt in made} == {s.cls, *filter(None, [s.beside])}, s.label
        if s.beside:
            ours = [p for opt in made if type(opt).__name__ == s.cls for g in opt.param_groups for p in g["params"]]
            assert len(ours) == 2 * 7 and {p.ndim for p in ours} == {2}
        dtypes = {p.dtype for p in known["model"].parameters()}
        assert dtypes == {torch.float32 if s.weights == "f32" else torch.bfloat16}, s.label


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("s", STEPPED, ids=lambda s: s.label.replace(" ", "-"))
def test_a_snippet_takes_a_step(s: Setup) -> None:
    known = run(s, step=True)
    opts = known["stepper"].optimizers if s.release else [known["opt"], *filter(None, [known.get("rest")])]
    states = [entry for opt in opts for entry in opt.state.values()]
    assert states and len(states) == sum(p.requires_grad for p in known["model"].parameters())
    assert all(p.grad is None for p in known["model"].parameters())


@pytest.mark.filterwarnings("ignore")
def test_the_lines_on_the_page_of_the_planner_take_a_step_of_qlora_on_a_toy() -> None:
    page = (Path(__file__).parents[2] / "docs/plan.md").read_text("utf-8")
    block, known = page.partition("```python\n")[2].partition("```")[0], dict[str, Any]()
    exec(block, known)
    assert type(known["model"].model.layers[0].mlp.up_proj).__name__ == "LoRALinear"
    assert len(known["opt"].state) == 2 * 2 * 7


def test_the_snippet_of_shards_calls_fully_shard_first() -> None:
    code = snippet(Setup("full", "bf16_sr", "AdamW8bit"), stage=3)
    compile(code, "snippet", "exec")
    assert code.index("fully_shard(model)") < code.index("rc.optim.AdamW8bit")
