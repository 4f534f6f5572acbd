"""One answer on the event loop, in portions whose tokens and text belong together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import dataclass, field

from agent.agent import Account, Agent, Event, Piece, Request, Writing


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
    events: asyncio.Queue[Event] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def on_event(event: Event) -> None:
        note(event)
        with suppress(RuntimeError):  # the event loop is gone, and the client with it
            loop.call_soon_threadsafe(events.put_nowait, event)

    writing = await _submit(agent, request, on_event)
    held: list[Piece] = []
    try:
        while not isinstance(event := await events.get(), Account):
            if isinstance(event, Exception):
                raise event
            if is_token(event):
                held.append(event)
            if event.text:
                yield Portion(event.text, held)
                held = []
        if held:
            yield Portion("", held)
        yield event
    finally:
        writing.cancel()


async def _submit(agent: Agent, request: Request, on_event: Callable[[Event], None]) -> Writing:
    """On a thread, as tokenizing a megabyte takes a second."""
    task = asyncio.create_task(asyncio.to_thread(agent.submit, request, on_event))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(_cancel)
        raise


def _cancel(task: asyncio.Task[Writing]) -> None:
    if not task.cancelled() and task.exception() is None:
        task.result().cancel()
