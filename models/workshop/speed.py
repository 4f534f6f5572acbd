"""How fast an engine answers, as a user meets it: one request, alone on the machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from statistics import median

from models.engine.base import Engine
from models.engine.base import Sequence as Place

READ = 256
"""Tokens of the prompt whose reading is timed; those that are written come after it."""
WRITTEN = 64
"""Tokens that are written."""
ASKED = 32
"""Tokens of the short question to which the first token is timed."""
ROUNDS = 3
"""Whose medians count, if nothing else is said."""

CONTEXT = READ + WRITTEN


@dataclass(frozen=True, slots=True)
class Speed:
    decode_tok_s: float
    prefill_tok_s: float
    first_token_ms: float


def speed(engine: Engine, text: Sequence[int], clock: Callable[[], float], rounds: int) -> Speed:
    """Medians of so many rounds; with a shorter prompt if the context is short. `text`: tokens to make prompts of, as
    often as needed; `clock` gives seconds."""
    prompt = list(islice(cycle(text), max(1, min(READ, engine.context - WRITTEN))))
    place = engine.open(prompt, WRITTEN)
    _write(engine, place, prompt[:ASKED], clock)  # weights come from the disk, threads settle
    times = [_round(engine, place, prompt, clock) for _ in range(rounds)]
    place.close()
    first, read, written = map(median, zip(*times, strict=True))
    return Speed(WRITTEN / written, len(prompt) / read, 1000 * first)


def _round(engine: Engine, place: Place, prompt: list[int], clock: Callable[[], float]) -> tuple[float, float, float]:
    """Seconds to the first token of a short question, to read the prompt, and to write after it."""
    place.rewind(0)
    began = clock()
    int(engine.forward([(place, prompt[:ASKED])])[0].logits.argmax())
    first = clock() - began
    return first, *_write(engine, place, prompt, clock)


def _write(engine: Engine, place: Place, prompt: list[int], clock: Callable[[], float]) -> tuple[float, float]:
    """Seconds to read the prompt, and to write WRITTEN tokens after it, the likeliest ones whatever they are."""
    place.rewind(0)
    times = [clock()]
    token = int(engine.forward([(place, prompt)])[0].logits.argmax())
    times.append(clock())
    for _ in range(WRITTEN):
        token = int(engine.forward([(place, [token])])[0].logits.argmax())
    times.append(clock())
    return times[1] - times[0], times[2] - times[1]
