"""A model of two small layers with a tokenizer of words, in a folder; a text and chats beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
transformers: Any = pytest.importorskip("transformers", reason="needs transformers: pip install 'refopt[finetune]'")
for package in ("torch", "typer", "peft", "accelerate"):
    pytest.importorskip(package, reason=f"needs {package}: pip install 'refopt[finetune]'")

WORDS = ["the", "moment", "of", "a", "gradient", "is", "kept", "in", "eight", "bits", "and", "read", "back"]
SMALL = "--steps 4 --batch 2 --context 16 --rank 4 --lr 0.01 --optimizer AdamW --device cpu"


def tokenizer() -> Any:
    """One token a word or sign; unknown ones are [UNK]."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    known = ["[UNK]", "[PAD]", "[END]", "user", "assistant", "system", ":", *WORDS]
    made = Tokenizer(models.WordLevel({w: k for k, w in enumerate(known)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]", eos_token="[END]"
    )


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Arrays are too small for more, and threads of several workers wait for one another."""
    import numba
    import torch

    before = torch.get_num_threads(), numba.get_num_threads()
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    yield
    torch.set_num_threads(before[0])
    numba.set_num_threads(before[1])


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=32,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with a text and chats in it."""
    monkeypatch.chdir(tmp_path)
    words = [WORDS[(k * k + k // 7) % len(WORDS)] for k in range(1200)]
    (tmp_path / "text.txt").write_text(" ".join(words), "utf-8")
    said = [{"role": "user", "content": "the moment"}, {"role": "assistant", "content": "is kept in eight bits"}]
    (tmp_path / "chats.jsonl").write_text((json.dumps({"messages": said}) + "\n") * 20, "utf-8")
    return tmp_path


@pytest.fixture
def finetune(here: Path, model: Path) -> Callable[[str], int]:
    """`refopt finetune MODEL ...`; returns the exit code."""
    from refopt.__main__ import main

    return lambda words: main(["finetune", str(model), *words.split()])
