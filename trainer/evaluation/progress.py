"""What a verb that takes a while says on stderr: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import track

Item = TypeVar("Item")
PLAIN_INTERVAL_S = 10.0
"""Seconds between two plain lines; what is over sooner says nothing."""


class Follow(Protocol):
    """Hands items on as they come, and shows how many of `total` there were: of `what`, one word or two."""

    def __call__(self, items: Iterable[Item], what: str, total: int) -> Iterator[Item]: ...


def unseen(items: Iterable[Item], what: str, total: int) -> Iterator[Item]:
    """Items as they come; shows nothing."""
    yield from items


def shown_on(console: Console, clock: Callable[[], float] = time.monotonic) -> Follow:
    """Shows on `console`. clock: seconds, from any start."""

    def bar(items: Iterable[Item], what: str, total: int) -> Iterator[Item]:
        yield from track(items, what, total, console=console)

    def lines(items: Iterable[Item], what: str, total: int) -> Iterator[Item]:
        said = clock()
        for done, item in enumerate(items):
            if (now := clock()) - said >= PLAIN_INTERVAL_S:
                said = now
                console.print(f"{what}: {done}/{total}", markup=False, highlight=False)
            yield item

    return bar if console.is_terminal else lines
