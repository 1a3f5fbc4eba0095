"""From start to a clean end: one process's daemons, ready line, signals."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, TypeVar

import trio

from alluxiofuse import descriptors
from alluxiofuse.cli.outcome import as_mistake, cause

T = TypeVar("T")
log = logging.getLogger(__name__)


@asynccontextmanager
async def running(start: Callable[..., Awaitable[Any]], *arguments: Any) -> AsyncIterator[Any]:
    """`start(*arguments, task_status=...)` in the background while the block runs, then cancelled and
    waited for. Gives what it was started with. If it fails, the block is cancelled and the error
    raised. Nested uses end in the reverse order: that is how a client ends before its daemons."""
    async with trio.open_nursery() as nursery:
        value = await nursery.start(lambda *a, task_status: start(*a, task_status=task_status), *arguments)
        try:
            yield value
        finally:
            nursery.cancel_scope.cancel()


class Life:
    """One run of daemons in this process.

    SIGTERM, SIGINT and SIGHUP (unless it is ignored, as under nohup): before they are ready the start
    is given up; afterwards `stop` is set, so that everything ends in order; a second one cancels
    everything at once.
    """

    def __init__(self) -> None:
        self.is_ready = False
        self.was_stopped = False
        """By a signal."""
        self.ready_text = ""
        """For the ready line; set by the daemons."""
        self.stop = trio.Event()

    def run(
        self,
        daemons: Callable[[Life], AbstractAsyncContextManager[None]],
        on_ready: Callable[[], None],
        clock: trio.abc.Clock | None = None,
    ) -> None:
        """Run `daemons` until a signal, `stop`, or until they fail. What fails before they are ready is
        raised as a UserError (a start-up error); later failures as they are."""
        descriptors.raise_limit()
        try:
            trio.run(self._run, daemons, on_ready, clock=clock)
        except BaseException as exc:
            raise (cause(exc) if self.is_ready else as_mistake(exc)) from exc

    async def _run(
        self, daemons: Callable[[Life], AbstractAsyncContextManager[None]], on_ready: Callable[[], None]
    ) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(self._watch_signals, nursery.cancel_scope)
            async with daemons(self):
                self.is_ready = True
                on_ready()
                await self.stop.wait()
                log.info("stopping")
            nursery.cancel_scope.cancel()

    async def _watch_signals(
        self, everything: trio.CancelScope, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        with trio.open_signal_receiver(*numbers) as received:
            task_status.started()
            async for number in received:
                log.info("got %s", signal.Signals(number).name)
                if not self.is_ready or self.was_stopped:
                    everything.cancel()
                self.was_stopped = True
                self.stop.set()


def print_ready(text: str, pid: int = 0) -> None:
    """The one line on stdout that scripts wait for. `pid`: which to send signals to; 0: ours."""
    print(f"ready: {text} (pid {pid or os.getpid()})", flush=True)
