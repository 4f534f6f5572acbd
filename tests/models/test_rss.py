"""Memory of processes."""

from __future__ import annotations

import os
import subprocess
import sys

from models.rss import rss


def test_a_process_knows_its_memory_and_another_s() -> None:
    assert 10 << 20 < rss() <= rss(peak=True)
    assert rss(os.getpid()) > 10 << 20
    assert rss(1 << 30) == 0


def test_a_process_does_not_begin_with_the_peak_of_the_one_that_started_it() -> None:
    large = b"x" * (200 << 20)
    command = "from models.rss import rss; print(rss(peak=True))"
    said = subprocess.run([sys.executable, "-c", command], check=True, stdout=subprocess.PIPE).stdout
    assert int(said) < len(large) < rss()
