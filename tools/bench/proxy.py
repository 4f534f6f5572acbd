"""A TCP proxy that adds a link's delay: every byte arrives half a round trip after it was sent, in order.

Run as a process of its own: `python -m tools.bench.proxy TARGET_PORT RTT_MS` prints the port that it listens on.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress

_CHUNK = 1 << 16


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: float) -> None:
    """Forwards bytes `delay` seconds after they came, without waiting for one chunk before reading the next."""
    loop = asyncio.get_running_loop()
    with suppress(ConnectionError):
        while data := await reader.read(_CHUNK):
            loop.call_later(delay, writer.write, data)
    loop.call_later(delay, writer.close)


async def serve(target: int, rtt: float) -> asyncio.Server:
    """Listens on a free loopback port in front of `target`; `rtt` in seconds."""

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", target)
        await asyncio.gather(_pump(reader, far_writer, rtt / 2), _pump(far_reader, writer, rtt / 2))

    return await asyncio.start_server(connection, "127.0.0.1", 0)


async def _main(target: int, rtt_ms: float) -> None:
    server = await serve(target, rtt_ms / 1000)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_main(int(sys.argv[1]), float(sys.argv[2])))
