"""`refopt convert`: optimizer states from one library's file to another's."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from refopt.spec import StateError
from refopt_cuda.convert import command, shapes

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LIBRARIES = ", ".join(shapes.LIBRARIES)


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def convert(
    source: Annotated[Path, typer.Argument(help=".pt, .pth, .bin, .ckpt or .safetensors")],
    target: Annotated[Path | None, typer.Argument(help="the file to write, by the same endings")] = None,
    of: Annotated[str | None, typer.Option("--from", help=f"{LIBRARIES} [what the file looks like]")] = None,
    to: Annotated[str, typer.Option("--to", help=LIBRARIES)] = "refopt",
    optimizer: Annotated[str | None, typer.Option(help="our class between them, such as AdamW8bit")] = None,
    codecs: Annotated[str | None, typer.Option(help="its codecs: q4, or m=q4,v=dynamic8,p=bf16_ecc")] = None,
    model: Annotated[Path | None, typer.Option(help="the weights' file, for shapes and dtypes")] = None,
    key: Annotated[str | None, typer.Option(help="where in the file the optimizer's state is")] = None,
    dtype: Annotated[str, typer.Option(help=f"of weights that no file tells: {', '.join(DTYPES)}")] = "float32",
    kind: Annotated[str | None, typer.Option(help="for torchao: 8bit, 4bit or fp8 [what our class keeps]")] = None,
    show: Annotated[bool, typer.Option("--list", help="print what is in the file and write nothing")] = False,
    force: Annotated[bool, typer.Option("--force", help="write over a file that is there")] = False,
) -> None:
    """Convert an optimizer's state between refopt, torch.optim, bitsandbytes, torchao, FlashOptim and transformers."""
    console = Console(highlight=False)
    if show:
        describe(command.state_dict_in(source, key), console)
        return
    if target is None:
        raise ValueError("name the file to write, or --list")
    if target.exists() and not force:
        raise ValueError(f"{target} is there; --force writes over it")
    if dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    words: dict[str, Any] = {"of": of, "to": to, "optimizer": optimizer, "codecs": _codecs(codecs), "kind": kind}
    opt = command.convert(source, target, **words, model=model, key=key, dtype=DTYPES[dtype])
    count = sum(len(group["params"]) for group in opt.param_groups)
    console.print(f"{target}: {command.stem_of(opt)} of {count} parameters for {to}", soft_wrap=True)


def _codecs(text: str | None) -> Any:
    """ "m=q4,p=bf16_ecc" as a dictionary, one word as it is."""
    if text is None or "=" not in text:
        return text
    return dict(part.strip().partition("=")[::2] for part in text.split(","))


def describe(state_dict: dict[str, Any], console: Console) -> None:
    """Print the groups' settings, and a line for each parameter."""
    console.print(f"{shapes.library_of(state_dict)}: {len(state_dict['state'])} states", soft_wrap=True)
    for k, group in enumerate(state_dict["param_groups"]):
        kept = {name: x for name, x in group.items() if name not in ("params", "param_names")}
        console.print(f"group {k}: " + ", ".join(f"{name} {x}" for name, x in kept.items()), soft_wrap=True)
    names = [name for group in state_dict["param_groups"] for name in group.get("param_names", [])]
    table = Table("group", "parameter", "step", "states", "bytes")
    total = 0
    for at, (k, number, entry) in enumerate(shapes.entries(state_dict)):
        tensors = {key: x for key, x in entry.items() if isinstance(x, torch.Tensor) and key != "step"}
        size = sum(map(_bytes, tensors.values()))
        total += size
        rows = "\n".join(f"{key} {_words(x)}" for key, x in tensors.items())
        step = entry.get("step")
        shown = "" if step is None else str(int(step))
        table.add_row(str(k), names[at] if names else str(number), shown, rows, f"{size:,}")
    console.print(table)
    console.print(f"{total:,} bytes of states", soft_wrap=True)


def _bytes(x: torch.Tensor) -> int:
    """Of a tensor, or of the tensors that a subclass is made of."""
    if hasattr(x, "__tensor_flatten__"):
        return sum(_bytes(getattr(x, name)) for name in x.__tensor_flatten__()[0])
    return x.numel() * x.element_size()


def _words(x: torch.Tensor) -> str:
    kind = type(x).__name__ if hasattr(x, "__tensor_flatten__") else str(x.dtype).removeprefix("torch.")
    return f"{kind} {tuple(x.shape)}"


def main(argv: list[str]) -> int:
    """Run `refopt convert`; returns the exit code: 0, or 2 for input that cannot be used."""
    errors, code = Console(stderr=True, highlight=False), 2
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", UserWarning)
        try:
            app(argv, prog_name="refopt convert")
        except SystemExit as end:
            code = int(end.code or 0)
        except (ValueError, TypeError, StateError, OSError, ModuleNotFoundError) as error:
            errors.print(f"refopt convert: {error}", soft_wrap=True, markup=False)
    for text in dict.fromkeys(str(w.message) for w in seen):
        errors.print(f"note: {text}", soft_wrap=True, markup=False)
    return code
