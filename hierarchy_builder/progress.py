"""What a running stage says: a bar on a terminal, a plain line now and then elsewhere; all of it on stderr."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_INTERVAL_S = 10.0
"""Seconds between two plain lines."""


class Meter:
    """Counts the images of one stage."""

    def __init__(self, stage: str, total: int) -> None:
        self.stage, self.total, self.done = stage, total, 0
        self.started = time.perf_counter()

    def advance(self, images: int) -> None:
        self.done += images

    @property
    def images_per_second(self) -> float:
        return self.done / max(time.perf_counter() - self.started, 1e-9)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started


class Reporter:
    """Shows the progress of stages; `quiet` shows nothing."""

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        self.quiet = quiet
        self.console = console or Console(stderr=True)

    def say(self, text: str) -> None:
        """One line for the user."""
        if not self.quiet:
            self.console.print(text, highlight=False, markup=False)

    @contextlib.contextmanager
    def stage(self, name: str, total: int, done: int = 0) -> Iterator[Meter]:
        """Follow one stage over `total` images, `done` of which an earlier run finished."""
        if self.quiet:
            yield Meter(name, total - done)
        elif self.console.is_terminal:
            yield from self._bar(name, total, done)
        else:
            yield from self._lines(name, total, done)

    def _bar(self, name: str, total: int, done: int) -> Iterator[Meter]:
        columns = (
            TextColumn("{task.description:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:>8.1f} images/s"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(name, total=total, completed=done, rate=0.0)

            class Bar(Meter):
                def advance(self, images: int) -> None:
                    super().advance(images)
                    progress.update(task, advance=images, rate=self.images_per_second)

            yield Bar(name, total - done)

    def _lines(self, name: str, total: int, done: int) -> Iterator[Meter]:
        say = self.say

        class Lines(Meter):
            said = 0.0

            def advance(self, images: int) -> None:
                super().advance(images)
                if self.seconds - self.said >= PLAIN_INTERVAL_S:
                    self.said = self.seconds
                    say(f"{name}: {done + self.done}/{total} images, {self.images_per_second:.1f} images/s")

        meter = Lines(name, total - done)
        yield meter
        say(
            f"{name}: {done + meter.done}/{total} images, {meter.done} now in {meter.seconds:.1f} s"
            + (f", {meter.images_per_second:.1f} images/s" if meter.done else "")
        )
