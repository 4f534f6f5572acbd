"""How an answer is shown to a person: coloured by provenance, with an account below."""

from __future__ import annotations

from typing import Any

import click

from agent.agent import Account, Piece
from agent.resolver import Provenance

COLOURS: dict[Provenance, dict[str, Any]] = {
    Provenance.LOCAL: {},
    Provenance.MEMORY: {"fg": "cyan"},
    Provenance.PEER: {"fg": "blue"},
    Provenance.CLOUD: {"fg": "green", "bold": True},
    Provenance.FALLBACK: {"fg": "yellow"},
}


def coloured(piece: Piece) -> str:
    who = piece.token.provenance or Provenance.LOCAL
    return click.style(piece.text, **COLOURS[who]) if piece.text else ""


def legend() -> str:
    return "  ".join(click.style(str(who), **style) for who, style in COLOURS.items())


def summary(account: Account) -> str:
    """The one-line account at the end of an answer."""
    counts = " ".join(f"{who} {count}" for who, count in account.counts.items() if count)
    counts += f" ({account.borrowed} learned elsewhere)" if account.borrowed else ""
    up, down = account.bytes_up + account.peer_bytes_up, account.bytes_down + account.peer_bytes_down
    return (
        f"{account.tokens} tokens: {counts} · LLM tokens {account.llm_tokens} · "
        f"bytes up {up} down {down} · {account.tok_s:.1f} tok/s · "
        f"threshold {account.threshold:g}"
    )


def explained(pieces: list[Piece]) -> str:
    """The table of `--explain`: one row per token."""
    rows = [f"{'token':<16} {'u':>6} {'who':<9} {'p':>6} {'wait ms':>8}  draft kept"]
    for piece in pieces:
        token = piece.token
        kept = (
            ""
            if token.provenance in (Provenance.LOCAL, Provenance.FALLBACK)
            else "yes"
            if token.id == token.draft
            else "no"
        )
        text = repr(piece.raw.decode("utf-8", "replace"))
        style = COLOURS[token.provenance or Provenance.LOCAL]
        row = f"{text:<16} {token.u:6.3f} {token.provenance:<9} {token.p:6.3f} {token.wait * 1000:8.1f}  {kept}"
        rows.append(click.style(row, **style))
    return "\n".join(rows)


def as_json(account: Account, pieces: list[Piece]) -> dict[str, Any]:
    """The object of `skerry ask --json`."""
    return {
        "text": "".join(piece.text for piece in pieces),
        "tokens": [
            {
                "text": piece.raw.decode("utf-8", "replace"),
                "id": piece.token.id,
                "u": round(piece.token.u, 6),
                "provenance": str(piece.token.provenance),
                "p": round(piece.token.p, 6),
                "why": str(piece.token.why),
                "origin": piece.token.origin,
                "beta": None if piece.token.beta is None else round(piece.token.beta, 6),
                "wait_ms": round(piece.token.wait * 1000, 3),
            }
            for piece in pieces
        ],
        "counts": account.counts,
        "finish": account.finish,
        "prompt_tokens": account.prompt_tokens,
        "llm_tokens": account.llm_tokens,
        "asked": account.asked,
        "rewinds": account.rewinds,
        "unmatched": round(account.unmatched, 6),
        "bytes_up": account.bytes_up,
        "bytes_down": account.bytes_down,
        "peer_bytes_up": account.peer_bytes_up,
        "peer_bytes_down": account.peer_bytes_down,
        "borrowed": account.borrowed,
        "mean_u": round(account.mean_u, 6),
        "first_token_s": round(account.first_token, 4),
        "tok_s": round(account.tok_s, 2),
        "threshold": account.threshold,
        "mode": account.mode,
        "model": account.model,
        "fingerprint": account.fingerprint,
    }
