"""`python -m models.workshop.gguf_quantize FILE OUT KIND THREADS`: llama.cpp's quantiser, which prints each tensor."""

from __future__ import annotations

import sys
from pathlib import Path


def main(source: Path, target: Path, kind: str, threads: int) -> None:
    import llama_cpp.llama_cpp as llama

    params = llama.llama_model_quantize_default_params()
    params.ftype = getattr(llama, "LLAMA_FTYPE_MOSTLY_" + kind.upper())
    params.allow_requantize = True
    params.nthread = threads
    failed = llama.llama_model_quantize(bytes(source), bytes(target), params)
    if failed:
        sys.exit("llama.cpp could not quantise it; the reason stands above")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
