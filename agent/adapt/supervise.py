"""The worker from outside: started, paused within milliseconds when somebody asks something, started again if it died.

A paused worker keeps its memory; one that is paused for long is ended, and goes on from its checkpoint later.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from agent.adapt import job as files
from agent.adapt.job import Job, Progress, Result
from protocol import errors
from protocol.errors import SkerryError, StoreError, TrainingError

log = logging.getLogger(__name__)

_RETRIES = 3  # of a worker that died without saying why
_LOOK_S = 0.2
_LONGEST_PAUSE_S = 300.0
_SILENCE_S = 900.0  # a training step takes at most 600

Command = Callable[[Path], list[str]]


class Stopped(Exception):
    """Training was ended from outside; its folder is left as it is."""


class Supervisor:
    """`run` is for one thread, which has to outlive the worker; the rest for any, and returns at once.

    `silence`: seconds of running without progress after which a worker hangs; `patience`: seconds of pause after which
    it is ended to give its memory back; `tell` hears each change of the progress.
    """

    def __init__(
        self,
        tell: Callable[[Progress], None] = lambda progress: None,
        *,
        silence: float = _SILENCE_S,
        patience: float = _LONGEST_PAUSE_S,
        retries: int = _RETRIES,
        clock: Callable[[], float] = time.monotonic,
        command: Command | None = None,
    ) -> None:
        self._tell = tell
        self._silence = silence
        self._patience = patience
        self._retries = retries
        self._clock = clock
        self._command = command or _worker
        self._changed = threading.Condition(threading.RLock())  # of what follows
        self._process: subprocess.Popen[bytes] | None = None
        self._paused_at: float | None = None
        self._closing = False
        self.starts = 0

    @property
    def pid(self) -> int | None:
        """Of the worker; None: none runs."""
        process = self._process
        return process.pid if process is not None else None

    @property
    def paused(self) -> bool:
        return self._paused_at is not None

    def pause(self) -> None:
        """The worker stands still when this returns, or is about to: one signal, no waiting."""
        with self._changed:
            if self._paused_at is None:
                self._paused_at = self._clock()
                self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        with self._changed:
            if self._paused_at is not None:
                self._paused_at = None
                self._signal(signal.SIGCONT)
                self._changed.notify_all()

    def close(self) -> None:
        """Ends the worker, and `run` with Stopped. Idempotent."""
        with self._changed:
            self._closing = True
            self._signal(signal.SIGKILL)
            self._changed.notify_all()

    def run(self, folder: Path) -> Result:
        """What came of the job in the folder. Raises its error, TrainingError if the worker died again and again or
        hung, StoreError, Stopped."""
        (folder / files.RESULT).unlink(missing_ok=True)
        for _ in range(self._retries + 1):
            status = self._run_once(folder)
            result = files.read(folder, files.RESULT, Result)
            if result is not None:
                return _checked(result)
            log.warning("training ended with status %d and is begun again where it was", status)
        raise TrainingError(
            f"training ended {self._retries + 1} times without a result (status {status}); {folder / files.LOG} may "
            "tell why"
        )

    def _run_once(self, folder: Path) -> int:
        """Until the worker ends by itself or hangs; its status. One that is ended for its memory does not count."""
        while True:
            self._start(folder)
            status = self._watch(folder)
            if status is not None:
                return status

    def _start(self, folder: Path) -> None:
        threads = str(_threads(folder))
        env = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), threads)
        env["OMP_WAIT_POLICY"] = "PASSIVE"  # threads that wait would take the processor from others
        try:
            with (folder / files.LOG).open("wb") as log_file, self._changed:
                self._changed.wait_for(lambda: self._closing or self._paused_at is None)
                if self._closing:
                    raise Stopped
                self._process = subprocess.Popen(
                    self._command(folder),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=log_file,
                    env=env,
                    start_new_session=True,  # Ctrl-C is for the parent
                )
                self.starts += 1
        except OSError as error:
            raise StoreError(f"training cannot be started in {folder}: {error.strerror}") from None

    def _watch(self, folder: Path) -> int | None:
        """Its status; None: it was ended because it was paused for long."""
        process = self._process
        assert process is not None
        last: Progress | None = None
        heard = self._clock()
        gave_up = False
        while True:
            try:
                status = process.wait(_LOOK_S)
                break
            except subprocess.TimeoutExpired:
                pass
            now = self._clock()
            progress = files.read(folder, files.PROGRESS, Progress)
            if progress is not None and progress != last:
                last, heard = progress, now
                self._tell(progress)
            with self._changed:
                paused_at = self._paused_at
                if paused_at is not None:
                    heard = now
                    if now - paused_at > self._patience:
                        gave_up = True
                        self._signal(signal.SIGKILL)
                elif now - heard > self._silence:
                    log.warning("training hangs and is ended")
                    self._signal(signal.SIGKILL)
        with self._changed:
            self._process = None
            if self._closing:
                raise Stopped
        return None if gave_up else status

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)  # does nothing once it has ended


def _worker(folder: Path) -> list[str]:
    return [sys.executable, "-P", "-m", "agent.adapt.worker", str(folder), str(os.getpid())]


def _threads(folder: Path) -> int:
    job = files.read(folder, files.JOB, Job)
    return job.threads if job is not None else 1


def _checked(result: Result) -> Result:
    """Raises the error that it tells of, as the class that it was in the worker."""
    if not result.kind:
        return result
    kind = getattr(errors, result.kind, None)
    if isinstance(kind, type) and issubclass(kind, SkerryError):
        raise kind(result.error)
    raise TrainingError(f"training failed: {result.kind}: {result.error}")
