"""A hundred devices on a small edge machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from tests.brokers import ROOT


def test_a_hundred_adapters_of_a_real_model_fit_the_memory() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.server.edge.adapters.hundred"],
        cwd=ROOT,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["matrices"] == 60
    assert told["rss_mb"] <= 600
