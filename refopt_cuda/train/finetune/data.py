"""Text or chats as blocks of tokens with labels: what is trained on, and what is held out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from refopt_cuda.train import data as texts
from refopt_cuda.train.errors import InputError

IGNORED = -100
EVERY = 10
"""One block, or chat, of so many is held out."""
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Blocks:
    """Rows of tokens (int64, rows x context), and labels of the same shape; IGNORED is not asked for."""

    name: str
    sha256: str
    train: list[dict[str, torch.Tensor]]
    held: list[dict[str, torch.Tensor]]

    @property
    def tokens(self) -> int:
        """Labels that are trained on."""
        return sum(int((row["labels"] != IGNORED).sum()) for row in self.train)


def load(text: Sequence[str], chat: Sequence[str], tokenizer: Any, context: int) -> Blocks:
    """Files of one kind. Raises InputError that names the file, and the line of a chat, at fault."""
    if text:
        found = texts.read([Path(p) for p in text])
        rows = list(of_text(bytes(found.data).decode("utf-8"), tokenizer, context))
        name, digest, option = found.name, found.sha256, "--text"
    else:
        whole = b"".join(texts.utf8(Path(p), "--chat") for p in chat)
        rows = [row for p in chat for row in of_chats(Path(p), tokenizer, context)]
        name, digest, option = ", ".join(Path(p).name for p in chat), hashlib.sha256(whole).hexdigest(), "--chat"
    if len(rows) < EVERY:
        raise InputError(f"{option}: {name} gives {len(rows)} blocks of {context} tokens; at least {EVERY} are needed")
    held = [row for k, row in enumerate(rows) if k % EVERY == EVERY - 1]
    return Blocks(name, digest, [row for k, row in enumerate(rows) if k % EVERY != EVERY - 1], held)


def of_text(text: str, tokenizer: Any, context: int) -> Iterator[dict[str, torch.Tensor]]:
    """The text's tokens in blocks, one after the other; what fills no block at the end is left out."""
    ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    for k in range(0, len(ids) - context + 1, context):
        row = torch.tensor(ids[k : k + context])
        yield {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row.clone()}


def of_chats(path: Path, tokenizer: Any, context: int) -> Iterator[dict[str, torch.Tensor]]:
    """One block a chat, cut or padded to the context; the labels are the assistant's messages."""
    for number, line in enumerate(texts.utf8(path, "--chat").decode("utf-8").splitlines(), 1):
        if line.strip():
            yield block(messages(line, f"--chat {path}: line {number}"), tokenizer, context)


def messages(line: str, where: str) -> list[dict[str, str]]:
    """The messages of one JSON line: {"messages": [{"role": ..., "content": ...}, ...]}."""
    try:
        found = json.loads(line)["messages"]
        out = [{"role": m["role"], "content": m["content"]} for m in found]
    except (ValueError, KeyError, TypeError) as error:
        kind = "is not JSON" if isinstance(error, ValueError) else "must hold messages with role and content"
        raise InputError(f"{where} {kind}: {line[:60]!r}") from None
    if any(m["role"] not in ROLES or not isinstance(m["content"], str) for m in out):
        raise InputError(f"{where}: a role is one of {', '.join(ROLES)}, and content is text; got {line[:60]!r}")
    if not any(m["role"] == "assistant" for m in out):
        raise InputError(f"{where} has no message of the assistant to learn")
    return out


def block(chat: list[dict[str, str]], tokenizer: Any, context: int) -> dict[str, torch.Tensor]:
    """The chat in the model's own template, or as `role: content` lines where it has none."""
    text = _rendered(chat, tokenizer)
    made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spoken = [k for k, message in enumerate(chat) if message["role"] == "assistant"]
    said = [(len(_rendered(chat[:k], tokenizer, True)), len(_rendered(chat[: k + 1], tokenizer))) for k in spoken]
    asked = [any(first <= at < last for first, last in said) for at, _ in made["offset_mapping"]]
    n = min(len(asked), context)
    row, labels = torch.full((context,), tokenizer.pad_token_id or 0), torch.full((context,), IGNORED)
    row[:n] = torch.tensor(made["input_ids"][:n], dtype=torch.int64)
    labels[:n] = torch.where(torch.tensor(asked[:n], dtype=torch.bool), row[:n], IGNORED)
    return {"input_ids": row, "attention_mask": (torch.arange(context) < n).long(), "labels": labels}


def _rendered(chat: list[dict[str, str]], tokenizer: Any, prompted: bool = False) -> str:
    """A chat as text; `prompted`: up to where the assistant begins to speak."""
    if not chat:
        return ""
    if tokenizer.chat_template:
        return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompted))
    end = tokenizer.eos_token or ""
    return "".join(f"{m['role']}: {m['content']}{end}\n" for m in chat) + ("assistant: " if prompted else "")
