"""Progress of long work on stderr: a Rich bar with figures and time left; plain lines in a log file."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress


class Task:
    """One bar."""

    def __init__(
        self,
        rich: RichProgress | None,
        identifier: TaskID | None,
        title: str,
        total: int,
        quiet: bool = False,
    ) -> None:
        self._rich, self._id, self._title, self._total, self._quiet = rich, identifier, title, total, quiet
        self._done = 0
        self._loss: float | None = None
        self._figure: float | None = None
        self._spoken = time.monotonic()
        self._first: tuple[float, int] | None = None

    def start_at(self, completed: int) -> None:
        self._done = completed
        self._first = (time.monotonic(), completed)

    def advance(self, count: int = 1, loss: float | None = None) -> None:
        """`count` more units are done."""
        self._done += count
        if loss is not None:
            self._loss = loss if self._loss is None else 0.95 * self._loss + 0.05 * loss
        if self._rich is not None and self._id is not None:
            self._rich.update(self._id, completed=self._done, note=self._note())
        elif not self._quiet and (time.monotonic() - self._spoken > 60 or self._done == self._total):
            self._spoken = time.monotonic()
            line = f"{self._title}: {self._done}/{self._total} {self._note()} {self._left()}"
            print(line.rstrip(), file=sys.stderr, flush=True)

    def figure(self, value: float) -> None:
        """Show the newest validation figure."""
        self._figure = value

    def _note(self) -> str:
        parts = []
        if self._loss is not None:
            parts.append(f"loss {self._loss:.4f}")
        if self._figure is not None:
            parts.append(f"validation {self._figure:.4f}")
        return "  ".join(parts)

    def _left(self) -> str:
        if self._first is None or self._done <= self._first[1]:
            return ""
        rate = (time.monotonic() - self._first[0]) / (self._done - self._first[1])
        return f"{rate * (self._total - self._done) / 60:.0f} min left"


class Progress:
    """Bars on a terminal; a line a minute where stderr is not one."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet)
        self.quiet = quiet

    def note(self, text: str) -> None:
        """Say something that the user should know."""
        self.console.print(text, highlight=False, soft_wrap=True)

    @contextmanager
    def task(self, title: str, total: int, completed: int = 0) -> Iterator[Task]:
        """A bar for `total` units, `completed` of which an earlier run did."""
        if not self.console.is_terminal or self.quiet:
            task = Task(None, None, title, total, self.quiet)
            task.start_at(completed)
            yield task
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[note]}"),
        )
        with RichProgress(*columns, console=self.console) as rich:
            task = Task(rich, rich.add_task(title, total=total, completed=completed, note=""), title, total)
            task.start_at(completed)
            yield task
