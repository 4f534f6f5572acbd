"""Rows for a ledger; run as a process, it writes them until it is killed.

Arguments: the file, and the number to begin with. Prints, after each flush, the last number that was noted before it.
"""

from __future__ import annotations

import sys
from itertools import count
from pathlib import Path

from agent.learn.ledger import Ledger
from agent.learn.ledger_rows import Features, Outcome, Row


def row(number: int = 0, outcome: Outcome = Outcome.AGREED, u: float = 0.5, beta: float | None = 0.25) -> Row:
    """`number` is found again as the position."""
    return Row(u, 1.0, 0.02, outcome, beta, 1, Features(0.5, number, 0.1))


def main() -> None:
    ledger = Ledger(Path(sys.argv[1]))
    for number in count(int(sys.argv[2])):
        ledger.passed(0.25, 0.02)
        ledger.note(row(number))
        if number % 7 == 0 and ledger.flush():
            print(number, flush=True)


if __name__ == "__main__":
    main()
