"""`python -m models.workshop.optimum_export FOLDER OUT`: Optimum's export with a cache, completed."""

from __future__ import annotations

import sys
from pathlib import Path

from models.workshop import graph


def main(folder: Path, out: Path) -> None:
    from optimum.exporters.onnx import main_export

    main_export(str(folder), str(out), task="text-generation-with-past", do_validation=False, trust_remote_code=False)
    path = out / "model.onnx"
    model = graph.load(path)
    for left in out.glob("model.onnx*"):
        left.unlink()
    graph.complete(model)
    graph.save(model, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
