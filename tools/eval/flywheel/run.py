"""All arms on one stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agent.adapt.train import Recipe
from tools.eval import news
from tools.eval.flywheel import report
from tools.eval.flywheel.play import ARMS, Play
from tools.eval.flywheel.stream import drawn
from tools.eval.flywheel.student import Student
from tools.eval.flywheel.thresholds import Thresholds
from tools.eval.flywheel.traffic import Traffic
from tools.eval.recordings import Model
from tools.eval.table import Dataset

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Setting:
    """`price`: of an LLM answer, what devices learn their thresholds for. `threshold`: their first. `corrections`:
    share of the answers to which the user says what is right. `rank`: of the adapters."""

    devices: int
    alpha: float
    price: float
    threshold: float
    corrections: float
    rank: int
    seed: int


def flywheel(
    slm: Path,
    llm: Path,
    data: Dataset,
    cache: Path,
    setting: Setting,
    threads: int,
    say: Callable[[str], None],
) -> Json:
    """Raises ConfigError, BadModelFile, ContextFull, StoreError, NoTraining, TrainingError."""
    large = Model(llm, threads=threads, hidden=False)
    readings = news.readings(large, data, cache, lambda line: say(f"{llm.stem}: {line}"))
    large.close()
    label = np.array([item.label for item in data.items], np.intp)
    y = np.stack([reading.p for reading in readings])
    stream = drawn(
        label, y, devices=setting.devices, alpha=setting.alpha, corrections=setting.corrections, seed=setting.seed
    )
    student = Student(slm, data, Recipe(rank=setting.rank), cache, threads, say)
    traffic = Traffic(student.tokenizer, large.tokenizer, data)
    bare = np.concatenate([student.view("", rows).x for rows in stream.rounds]).argmax(axis=1)
    played = {
        "slm": report.reference(stream, traffic, llm=False, draft=bare),
        "llm": report.reference(stream, traffic, llm=True, draft=bare),
    }
    for arm in ARMS:
        say(arm.title)
        thresholds = Thresholds(setting.devices, setting.price, setting.threshold)
        played[arm.name] = Play(arm, stream, student, traffic, thresholds, setting.seed).run()
    titles = report.titles()
    arms = {
        name: report.arm(stream, name, titles[name], one, played["llm"], setting.seed) for name, one in played.items()
    }
    return {
        "slm": slm.stem,
        "llm": llm.stem,
        "items": len(label),
        "labels": list(data.labels),
        "devices": setting.devices,
        "price": setting.price,
        "threshold": setting.threshold,
        "corrections": setting.corrections,
        "arms": list(arms.values()),
        "claims": report.claims(arms, stream, played),
    }
