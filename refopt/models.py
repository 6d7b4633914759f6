"""Shapes of real models: every weight of a decoder-only transformer, from a name or a transformers `config.json`.

>>> from refopt import models
>>> models.named("llama-2-7b").size
6738415616
>>> small = models.from_config({"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12})
>>> small.size, small.tensors[0]
(124439808, ('wte', (50257, 768)))
"""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Shape = tuple[int, ...]
Tensors = tuple[tuple[str, Shape], ...]


@dataclass(frozen=True)
class Model:
    """A decoder-only transformer: its weights by name, and the sizes that activations depend on.

    hidden, layers, heads, vocab: as usual; kv: the width of all key heads together; ffn: the width inside a block's
    MLP; gated: SwiGLU (three matrices) rather than GELU (two); linear: names of the matrices that LoRA adapts and 4-bit
    formats store.
    """

    name: str
    tensors: Tensors = field(repr=False)
    hidden: int
    layers: int
    heads: int
    kv: int
    ffn: int
    vocab: int
    gated: bool = True
    linear: frozenset[str] = field(default=frozenset(), repr=False)

    @property
    def shapes(self) -> list[Shape]:
        return [shape for _, shape in self.tensors]

    @property
    def size(self) -> int:
        """Weights, in elements."""
        return sum(math.prod(shape) for shape in self.shapes)

    def linears(self) -> list[Shape]:
        """Shapes (out, in) of the matrices inside the blocks."""
        return [shape for name, shape in self.tensors if name.rpartition(".")[2] in self.linear]


def llama(
    name: str,
    hidden: int,
    layers: int,
    heads: int,
    ffn: int,
    vocab: int = 32000,
    kv_heads: int | None = None,
    tied: bool = False,
    head: int | None = None,
    bias: bool = False,
) -> Model:
    """A model of the Llama family: RMSNorm, RoPE, SwiGLU, grouped keys; `bias` on q, k and v as in Qwen 2."""
    head = head or hidden // heads
    wide, kv = heads * head, (kv_heads or heads) * head
    block: dict[str, Shape] = {"q": (wide, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, wide)}
    block |= {"gate": (ffn, hidden), "up": (ffn, hidden), "down": (hidden, ffn)}
    linear = frozenset(block)
    block |= {"q_bias": (wide,), "k_bias": (kv,), "v_bias": (kv,)} if bias else {}
    block |= {"input_norm": (hidden,), "post_norm": (hidden,)}
    tensors = [("embed", (vocab, hidden)), *_stack(block, layers), ("norm", (hidden,))]
    tensors += [] if tied else [("lm_head", (vocab, hidden))]
    return Model(name, tuple(tensors), hidden, layers, heads, kv, ffn, vocab, linear=linear)


def gpt2(name: str, hidden: int, layers: int, heads: int, vocab: int = 50257, positions: int = 1024) -> Model:
    """GPT-2: learned positions, LayerNorm and biases, GELU, tied head; matrices lie (in, out)."""
    block: dict[str, Shape] = {"attn": (hidden, 3 * hidden), "proj": (hidden, hidden)}
    block |= {"fc": (hidden, 4 * hidden), "out": (4 * hidden, hidden)}
    linear = frozenset(block)
    block |= {f"{n}_bias": shape[1:] for n, shape in block.items()}
    block |= {f"{n}_{part}": (hidden,) for n in ("ln_1", "ln_2") for part in ("weight", "bias")}
    tensors = [("wte", (vocab, hidden)), ("wpe", (positions, hidden)), *_stack(block, layers)]
    tensors += [("ln_f_weight", (hidden,)), ("ln_f_bias", (hidden,))]
    return Model(name, tuple(tensors), hidden, layers, heads, hidden, 4 * hidden, vocab, gated=False, linear=linear)


def _stack(block: Mapping[str, Shape], layers: int) -> list[tuple[str, Shape]]:
    return [(f"{k}.{name}", shape) for k in range(layers) for name, shape in block.items()]


MODELS = {
    m.name: m
    for m in (
        gpt2("gpt2", 768, 12, 12),
        gpt2("gpt2-medium", 1024, 24, 16),
        gpt2("gpt2-large", 1280, 36, 20),
        gpt2("gpt2-xl", 1600, 48, 25),
        llama("llama-3.2-1b", 2048, 16, 32, 8192, 128256, 8, tied=True),
        llama("llama-3.2-3b", 3072, 28, 24, 8192, 128256, 8, tied=True),
        llama("llama-2-7b", 4096, 32, 32, 11008),
        llama("llama-3-8b", 4096, 32, 32, 14336, 128256, 8),
        llama("llama-2-13b", 5120, 40, 40, 13824),
        llama("llama-33b", 6656, 60, 52, 17920),
        llama("llama-65b", 8192, 80, 64, 22016),
        llama("llama-2-70b", 8192, 80, 64, 28672, kv_heads=8),
        llama("llama-3-70b", 8192, 80, 64, 28672, 128256, 8),
    )
}
"""Published models by name."""


def named(name: str) -> Model:
    """A published model. Raises ValueError with a suggestion for a name that is not known."""
    if name not in MODELS:
        near = difflib.get_close_matches(str(name), MODELS, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"models.named: no model {name!r}{hint}; there are {', '.join(MODELS)}")
    return MODELS[name]


def sized(count: float) -> Model:
    """A Llama of about so many weights (within a thousandth): blocks 128 wide for each that there is, 32,000 words, the
    width inside the MLP fitted. Raises ValueError below 50 million, where the words outweigh the blocks.

    >>> sized(7e9)
    Model(name='7B', hidden=4096, layers=32, heads=32, kv=4096, ffn=11680, vocab=32000, gated=True)
    """
    if isinstance(count, bool) or not isinstance(count, int | float) or not 5e7 <= count <= 1e13:
        raise ValueError(
            f"models.sized: count must be 5e7 to 1e13 weights, got {count!r}; smaller models: a config.json"
        )
    vocab = 32000

    def rest(layers: int) -> float:
        h = 128 * layers
        return count - 2 * vocab * h - layers * (4 * h * h + 2 * h) - h

    layers = min(range(2, 400), key=lambda n: abs(rest(n) / (3 * 128 * n * n) - 8 / 3 * 128 * n))
    h = 128 * layers
    ffn = max(16, 16 * round(rest(layers) / (3 * h * layers) / 16))
    name = f"{count / 1e9:.3g}B" if count >= 1e9 else f"{count / 1e6:.3g}M"
    return llama(name, h, layers, layers, ffn, vocab)


LLAMAS = ("llama", "mistral", "qwen2", "qwen3")


def from_config(config: Mapping[str, Any] | str | os.PathLike[str]) -> Model:
    """The model that a transformers `config.json` describes: the file, its folder, or what is in it.

    Raises ValueError for a family whose shapes are not known here, and for a size that is missing or not positive.
    """
    if not isinstance(config, Mapping):
        path = Path(config)
        path = path / "config.json" if path.is_dir() else path
        config = json.loads(path.read_text("utf-8"))
        if not isinstance(config, Mapping):
            raise ValueError(f"models.from_config: {path} holds {type(config).__name__}, not an object")
    kind = config.get("model_type")
    label = str(config.get("_name_or_path") or kind)
    if kind == "gpt2":
        width, depth, heads = (_whole(config, n, d) for n, d in (("n_embd", 768), ("n_layer", 12), ("n_head", 12)))
        vocab, positions = _whole(config, "vocab_size", 50257), _whole(config, "n_positions", 1024)
        return gpt2(label, width, depth, heads, vocab, positions)
    if kind not in LLAMAS:
        raise ValueError(
            f"models.from_config: model_type must be gpt2, {', '.join(LLAMAS)}, got {kind!r}; "
            f"give the shapes of its weights instead"
        )
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    hidden, layers, heads, ffn, vocab = (_whole(config, n) for n in names)
    kv = _whole(config, "num_key_value_heads", heads)
    head = _whole(config, "head_dim", hidden // heads)
    tied = bool(config.get("tie_word_embeddings", False))
    made = llama(label, hidden, layers, heads, ffn, vocab, kv, tied, head, kind == "qwen2")
    return made if kind != "qwen3" else _with_head_norms(made, head)


def _with_head_norms(model: Model, head: int) -> Model:
    """Qwen 3 norms the queries and keys of each head."""
    norms = _stack({"q_norm": (head,), "k_norm": (head,)}, model.layers)
    return Model(**{**model.__dict__, "tensors": (*model.tensors, *norms)})


def _whole(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = config.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"models.from_config: {name} must be whole and >= 1, got {value!r}")
    return value
