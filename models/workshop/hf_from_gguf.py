"""`python -m models.workshop.hf_from_gguf FILE FOLDER`: a GGUF file as a Hugging Face folder in float32."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

from models.gguf_header import check_tensors
from models.workshop.tokenizer_json import write_tokenizer


def main(source: Path, folder: Path) -> None:
    import gguf
    import torch
    from transformers import AutoModelForCausalLM

    # transformers reads the whole header again for every question, which takes a minute with large vocabularies.
    gguf.GGUFReader = cache(gguf.GGUFReader)
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    model.save_pretrained(folder, safe_serialization=True)
    write_tokenizer(check_tensors(source).values, folder / "tokenizer.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
