"""What a running stage says: a bar on a terminal, a plain line now and then elsewhere, a file for other terminals.

Bar and lines go to stderr. The file is replaced every second or two and goes when the stage ends, so `status` reads
how far the units of all workers are.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, track

from hierarchy_builder.files.exclusion import LeaseLostError, still_ours
from hierarchy_builder.files.whole import write_json
from hierarchy_builder.terminal import say, stderr

Item = TypeVar("Item")
PLAIN_INTERVAL_S = 10.0
"""Seconds between two plain lines."""

LIVE_INTERVAL_S = 1.0
"""Seconds between two writings of the file others read."""


@dataclass
class Meter:
    """Counts the images of one stage: `total` to do now, `before` done by an earlier run.

    failed: those among the done that could not be used. shows: called after every advance.
    """

    stage: str
    total: int
    before: int = 0
    shows: list[Callable[[], None]] = field(default_factory=list)
    done: int = 0
    failed: int = 0
    started: float = field(default_factory=time.perf_counter)

    def advance(self, images: int, failed: int = 0) -> None:
        self.done += images
        self.failed += failed
        for show in self.shows:
            show()

    @property
    def images_per_second(self) -> float:
        return self.done / max(self.seconds, 1e-9)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    @property
    def remaining_s(self) -> float | None:
        """Seconds still to go at the rate so far; None before anything is done."""
        return (self.total - self.done) / self.images_per_second if self.done else None

    def as_row(self) -> dict[str, Any]:
        """Plain data for the file others read."""
        left = self.remaining_s
        return {
            "stage": self.stage,
            "images": self.before + self.total,
            "images_done": self.before + self.done,
            "failed": self.failed,
            "images_per_second": round(self.images_per_second, 2),
            "seconds": round(self.seconds, 1),
            "remaining_s": None if left is None else round(left, 1),
        }

    def as_text(self) -> str:
        """One line: how far, how fast, how many failed."""
        text = f"{self.stage}: {self.before + self.done}/{self.before + self.total} images"
        return text + (f", {self.failed} could not be used" if self.failed else "")


@dataclass(frozen=True, kw_only=True)
class Reporter:
    """Shows the progress of stages on stderr; `quiet` shows nothing here, others can still read it."""

    quiet: bool = False

    def say(self, text: str) -> None:
        """One line for the user."""
        say(text, self.quiet)

    @contextlib.contextmanager
    def stage(self, name: str, total: int, done: int = 0, live: Path | None = None) -> Iterator[Meter]:
        """Follow one stage over `total` images, `done` of which an earlier run finished.

        live: file for others; see `store.units.running_stage`.
        """
        meter = Meter(name, total - done, done)
        with contextlib.ExitStack() as stack:
            if live is not None:
                meter.shows.append(stack.enter_context(_shared(live, meter)))
            if not self.quiet:
                view = self._bar(meter) if stderr.is_terminal else self._lines(meter)
                meter.shows.append(stack.enter_context(view))
            meter.advance(0)
            yield meter

    @contextlib.contextmanager
    def _bar(self, meter: Meter) -> Iterator[Callable[[], None]]:
        columns = (
            TextColumn("{task.description:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:>8.1f} images/s"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[failed]}"),
        )
        with Progress(*columns, console=stderr) as progress:
            task = progress.add_task("", total=None, rate=0.0, failed="")

            def show() -> None:
                progress.update(
                    task,
                    description=meter.stage,
                    total=meter.before + meter.total,
                    completed=meter.before + meter.done,
                    rate=meter.images_per_second,
                    failed=f"{meter.failed} failed" if meter.failed else "",
                )

            yield show

    @contextlib.contextmanager
    def _lines(self, meter: Meter) -> Iterator[Callable[[], None]]:
        is_due = _every(PLAIN_INTERVAL_S)

        def show() -> None:
            if is_due():
                left = "" if meter.remaining_s is None else f", {as_duration(meter.remaining_s)} left"
                self.say(f"{meter.as_text()}, {meter.images_per_second:.1f} images/s{left}")

        yield show
        now = f", {meter.done} now in {meter.seconds:.1f} s"
        self.say(meter.as_text() + now + (f", {meter.images_per_second:.1f} images/s" if meter.done else ""))


@contextlib.contextmanager
def _shared(path: Path, meter: Meter) -> Iterator[Callable[[], None]]:
    is_due = _every(LIVE_INTERVAL_S, at_once=True)

    def show() -> None:
        if is_due():
            still_ours(path)
            write_json(path, {**meter.as_row(), "time": time.time()})

    try:
        yield show
    finally:
        with contextlib.suppress(LeaseLostError):  # it is then the file of another process
            still_ours(path)
            path.unlink(missing_ok=True)


class Follow(Protocol):
    """Hands items on as they come, and shows how many of `total` there were: of `what`, one word or two."""

    def __call__(self, items: Iterable[Item], what: str, total: int) -> Iterator[Item]: ...


def unseen(items: Iterable[Item], what: str, total: int) -> Iterator[Item]:
    """Items as they come; shows nothing."""
    return iter(items)


def shown(items: Iterable[Item], what: str, total: int) -> Iterator[Item]:
    """Shows a bar on a terminal, and a line now and then elsewhere."""
    if stderr.is_terminal:
        yield from track(items, what, total, console=stderr)
        return
    is_due = _every(PLAIN_INTERVAL_S)
    for done, item in enumerate(items):
        if is_due():
            say(f"{what}: {done}/{total}")
        yield item


def _every(interval_s: float, *, at_once: bool = False) -> Callable[[], bool]:
    """Whether `interval_s` seconds have passed since the call that was last answered with yes."""
    last = time.perf_counter() - (interval_s if at_once else 0)

    def is_due() -> bool:
        nonlocal last
        if (now := time.perf_counter()) - last < interval_s:
            return False
        last = now
        return True

    return is_due


def as_duration(seconds: float) -> str:
    """`1:02:03`, or `2:03` below an hour."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
