"""One answer on the event loop, in portions whose tokens and text belong together."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field

from agent.agent import Account, Agent, Event, Piece, Request


@dataclass(frozen=True, slots=True)
class Portion:
    """Text and the tokens that it is made of. `text` is "" for tokens that are not shown: the end, a stop string."""

    text: str
    pieces: list[Piece] = field(default_factory=list)


def is_token(piece: Piece) -> bool:
    """False for what only sets free text that was held back when the answer ended."""
    return bool(piece.raw) or not piece.text


async def portions(
    agent: Agent, request: Request, note: Callable[[Event], None]
) -> AsyncGenerator[Portion | Account, None]:
    """The answer, then its account. Leaving early cancels it. `note` sees every event on the engine's thread, those
    of an answer that was left included. Raises RequestError, Overloaded."""
    held: list[Piece] = []
    async with aclosing(agent.stream(request, note)) as events:
        async for event in events:
            if isinstance(event, Account):
                if held:
                    yield Portion("", held)
                yield event
                return
            if is_token(event):
                held.append(event)
            if event.text:
                yield Portion(event.text, held)
                held = []
