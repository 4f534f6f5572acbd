"""`python -m models.workshop.reference FOLDER OUT ID…`: what PyTorch computes, to compare an export with.

OUT.npz gets `logits` (T, V) and `hidden` (T, d), of the model in the Hugging Face folder after each of the T tokens.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np


def main(folder: Path, out: Path, tokens: list[int]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model.eval()
    with torch.inference_mode():
        result = model(torch.tensor([tokens]), output_hidden_states=True)
    np.savez(out, logits=result.logits[0].numpy(), hidden=result.hidden_states[-1][0].numpy())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), [int(token) for token in sys.argv[3:]])
