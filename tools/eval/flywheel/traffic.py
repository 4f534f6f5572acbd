"""What an arm's messages weigh: the product's own, encoded and counted."""

from __future__ import annotations

from models.engine.base import Tokenizer
from protocol.topics import NEWS, Cluster
from protocol.transport.inbox import packet_bytes
from tools.eval.dialogue import Dialogue
from tools.eval.measure import sizes
from tools.eval.news import messages, spelled
from tools.eval.table import Dataset


class Traffic:
    """`entry`: bytes of one memory entry, up once or down to one device."""

    def __init__(self, slm: Tokenizer, llm: Tokenizer, data: Dataset) -> None:
        ours, theirs = spelled(slm, data.labels), spelled(llm, data.labels)
        dialogue = Dialogue(slm, llm)
        alternatives = [label[0] for label in theirs]
        self._open = [dialogue.open(messages(data.labels, item.text)) for item in data.items]
        self._ask = [dialogue.ask(0, label[0]) for label in ours]
        self._reply = [
            dialogue.answer(label[:1], alternatives) + sum(map(dialogue.more, label[1:-1])) for label in theirs
        ]
        self.entry = packet_bytes(Cluster("fleet", "cluster-0").path(NEWS, "device-0"), bytes(sizes()[0]), NEWS.qos)

    def asked(self, row: int, draft: int, said: int) -> int:
        """Both ways, one question."""
        return self._open[row] + self._ask[draft] + self._reply[said]
