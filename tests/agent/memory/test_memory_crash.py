"""kill -9 at random moments, hundreds of times: what was acknowledged is there, and the index equals SQLite."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.agent.memory.memories import PATIENCE, indexed, keys, opened, stored, tokens

ROUNDS = 110  # of each of two writers that are killed
ROUNDS_PER_FOLDER = 25
WIDTH = 16
LONGEST_S = 0.03  # from the last acknowledgement that is waited for to the kill
FLEETING = 1_000_000  # tokens from here on are of entries that may go

# Forks a writer per round, so that a round takes milliseconds. A writer says what it finds, then what is durable.
WRITERS = f"""
import os, random, sys
from pathlib import Path
from agent.memory.segments_build import ChildBuilder
from tests.agent.memory.memories import *

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def write(folder, number):
    draw = random.Random(number)
    builder = {{"build": ChildBuilder()}} if number % 10 == 0 else {{}}
    memory = opened(folder, tail_limit=60, **builder)
    found = stored(folder)
    assert indexed(memory) == sorted(found), "the index is not what SQLite holds"
    say("found", *found.values())
    first, drawn = 1000 * number, keys(1000, width={WIDTH}, seed=number)
    for batch in range(1, 40):
        end = first + draw.randrange(1, 40)
        learned = entries(drawn[first % 1000 : end % 1000], first=first)
        if draw.random() < 0.5:
            memory.add(learned)
        else:
            for one in learned:
                memory.learn(one)
            memory.flush()
        say("durable", *range(first, end))
        first = end
        if batch % 3 == 0:
            passing = [entry({FLEETING} + first + n, drawn[-n], origin=b"p" * 32) for n in range(1, 20)]
            memory.add(passing)
            ids = [n.id for one in passing for n in memory.neighbours(SPACE, drawn[0], one.tail, 60) if n.tail == 8]
            for _ in range(3):
                memory.blame(ids)
        if first % 1000 > 900:
            break
    memory.close()

for line in sys.stdin:
    folder, number = line.split()
    if (child := os.fork()) == 0:
        try:
            say("writer", os.getpid())
            write(Path(folder), int(number))
            say("closed")
        except BaseException as error:
            say("failed", repr(error))
        os._exit(0)
    os.waitpid(child, 0)
    say("dead")
"""


class Writers:
    """One after the other, each killed at some moment, opening what the one before left."""

    def __init__(self, root: Path, seed: int) -> None:
        self._root = root
        self._random = random.Random(seed)
        self.failures: list[str] = []
        self.killed = 0
        self.durable: dict[Path, set[int]] = {}

    def run(self) -> None:
        pipe = subprocess.PIPE
        with subprocess.Popen([sys.executable, "-c", WRITERS], stdin=pipe, stdout=pipe, text=True) as process:
            for number in range(ROUNDS):
                folder = self._root / str(number // ROUNDS_PER_FOLDER)
                self._round(process, folder, number)
            assert process.stdin is not None
            process.stdin.close()

    def _round(self, process: subprocess.Popen[str], folder: Path, number: int) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{folder} {number}\n")
        process.stdin.flush()
        durable = self.durable.setdefault(folder, set())
        answers = self._random.choice((1, 1, 2, 3, 5))  # that are waited for before the kill
        killer: threading.Thread | None = None
        for line in process.stdout:
            kind, *words = line.split()
            if kind == "writer":
                pid = int(words[0])
            elif kind == "found":
                if lost := durable - set(map(int, words)):
                    self.failures.append(f"round {number} lost {len(lost)} entries")
            elif kind == "durable":
                durable.update(map(int, words))
            elif kind == "failed":
                self.failures.append(f"round {number}: {line}")
            elif kind == "dead":
                break
            answers -= 1
            if answers == 0:
                killer = threading.Thread(target=self._kill, args=(pid, self._random.uniform(0, LONGEST_S)))
                killer.start()
        if killer is not None:
            killer.join()

    def _kill(self, pid: int, delay: float) -> None:
        time.sleep(delay)  # the moment is meant to be random
        try:
            os.kill(pid, signal.SIGKILL)
            self.killed += 1
        except ProcessLookupError:
            pass  # it had finished


@pytest.mark.timeout(300)
def test_nothing_acknowledged_is_lost_when_a_writer_is_killed(tmp_path: Path) -> None:
    chains = [Writers(tmp_path / str(seed), seed) for seed in range(2)]
    threads = [threading.Thread(target=chain.run) for chain in chains]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [failure for chain in chains for failure in chain.failures] == []
    assert sum(chain.killed for chain in chains) >= 200
    for chain in chains:
        for folder, durable in chain.durable.items():
            with opened(folder, tail_limit=60) as memory:
                found = stored(folder)
                assert durable <= set(found.values())
                assert indexed(memory) == sorted(found)
                assert memory.settle(PATIENCE)
                for token in sorted(durable)[:: max(1, len(durable) // 20)]:
                    key = keys(1000, width=WIDTH, seed=token // 1000)[token % 1000]
                    assert tokens(memory, key, 3)[0] == token
                assert indexed(memory) == sorted(stored(folder))
