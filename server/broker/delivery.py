"""What a client is still to get: in order, at QoS 1 until it has been acknowledged, across connections."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from dataclasses import dataclass

from amqtt.mqtt.protocol.broker_handler import BrokerProtocolHandler

log = logging.getLogger(__name__)

_MOST, _MOST_BYTES = 10_000, 16 << 20  # that wait for one client


@dataclass(frozen=True, slots=True)
class Parcel:
    topic: str
    data: bytes
    qos: int
    retained: bool = False


class Deliveries:
    """Of one session. When there are too many, new ones are refused, as Mosquitto does; `refused` counts them."""

    def __init__(self) -> None:
        self.refused = 0
        self._waiting: deque[Parcel] = deque()
        self._bytes = 0
        self._wake = asyncio.Event()

    def put(self, parcel: Parcel) -> None:
        if len(self._waiting) >= _MOST or self._bytes + len(parcel.data) > _MOST_BYTES:
            self.refused += 1
            return
        self._waiting.append(parcel)
        self._bytes += len(parcel.data)
        self._wake.set()

    async def run(self, handler: BrokerProtocolHandler) -> None:
        """Sends one after the other over a connection, which it ends if the client does not acknowledge."""
        try:
            while True:
                while not self._waiting:
                    self._wake.clear()
                    await self._wake.wait()
                parcel = self._waiting[0]
                await handler.mqtt_publish(parcel.topic, parcel.data, parcel.qos, retain=parcel.retained)
                self._waiting.popleft()
                self._bytes -= len(parcel.data)
        except Exception as error:
            log.debug("a client's connection is ended: %s", type(error).__name__)
            await handler.handle_connection_closed()

    def forget_qos0(self) -> None:
        """Nobody is connected."""
        self._waiting = deque(parcel for parcel in self._waiting if parcel.qos)
        self._bytes = sum(len(parcel.data) for parcel in self._waiting)
