"""What the open files of one client share."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import trio

from alluxiofuse.client.changes import ChangeLog
from alluxiofuse.client.direct import DirectReader
from alluxiofuse.client.session import Session
from alluxiofuse.client.slabs import SlabCache
from alluxiofuse.client.workers import WorkerPool
from alluxiofuse.config import ClientConfig
from alluxiofuse.errors import UnavailableError
from alluxiofuse.rpc import interrupt
from alluxiofuse.wire.types import Attr, Layout

if TYPE_CHECKING:
    from alluxiofuse.client.content import Content

T = TypeVar("T")

NO_WORKER = "no worker is running: start one to write files"
_RETRY_S = 0.2
OUTAGE_MEMORY_S = 30.0
"""An outage that nobody has met for so long is over: the next failure begins another one."""
MAX_KERNEL_CONTAINERS = 100_000
MAX_RECENT_CONTENTS = 2000


class KernelPages:
    """Which content the kernel may have in its page cache, by inode; bounded, least recent first out.

    A container names bytes, but while several sessions write to it each kernel's pages are only what
    passed through that kernel. So what was cached of such a container is forgotten, and once it is
    sealed it goes by another number (`Layout.is_shared`)."""

    def __init__(self, max_count: int = MAX_KERNEL_CONTAINERS) -> None:
        self._max_count = max_count
        self._containers: OrderedDict[int, int] = OrderedDict()

    def opened(self, ino: int, container: int, *, is_shared: bool = False) -> bool:
        """The kernel is about to cache this content, which changes only by writes through that kernel;
        whether what it may have already is the same."""
        key = -container if is_shared else container
        is_same = self._containers.get(ino) == key
        self._containers[ino] = key
        self._containers.move_to_end(ino)
        if len(self._containers) > self._max_count:
            self._containers.popitem(last=False)
        return is_same

    def written(self, ino: int, old: int, new: int, *, is_shared: bool = False) -> None:
        """`old` becomes `new` by writes that pass through the kernel: its pages follow. `is_shared`: of
        `old`."""
        if self._containers.get(ino) == (-old if is_shared else old):
            self._containers[ino] = new
        else:
            self._containers.pop(ino, None)

    def forget(self, ino: int) -> None:
        self._containers.pop(ino, None)

    def clear(self) -> None:
        self._containers.clear()


class RecentContents:
    """Attributes and layouts of inodes that were open here lately and have not changed since, so that
    they can be opened while the master is away for a moment; bounded, least recent first out."""

    def __init__(self, max_count: int = MAX_RECENT_CONTENTS) -> None:
        self._max_count = max_count
        self._known: OrderedDict[int, tuple[Attr, Layout]] = OrderedDict()

    def closed(self, ino: int, attr: Attr, layout: Layout) -> None:
        if layout.home or attr.container != layout.container:
            self.forget(ino)
            return
        self._known[ino] = attr, layout
        self._known.move_to_end(ino)
        if len(self._known) > self._max_count:
            self._known.popitem(last=False)

    def get(self, ino: int) -> tuple[Attr, Layout] | None:
        return self._known.get(ino)

    def forget(self, ino: int) -> None:
        self._known.pop(ino, None)

    def clear(self) -> None:
        self._known.clear()


@dataclass(slots=True, eq=False)
class Core:
    """Constant after construction; each part belongs to the FileSystem's trio thread."""

    session: Session
    workers: WorkerPool
    slabs: SlabCache
    direct: DirectReader
    config: ClientConfig
    kernel_pages: KernelPages
    contents: dict[int, Content] = field(default_factory=dict)
    """Of the inodes that are open, by number."""
    recent: RecentContents = field(default_factory=lambda: RecentContents())
    changes: ChangeLog = field(default_factory=lambda: ChangeLog())
    """When attributes or content of inodes changed last, by others or by this client."""
    outage_since_s: float | None = None
    """When the outage of workers for writing began that lasts; None: the last one that was asked answered."""
    outage_seen_at_s: float = 0.0
    passes: bool = False
    """The kernel takes slabs, to read and write them itself (see `passing`)."""

    @property
    def passes_writes(self) -> bool:
        """Under CACHE_THROUGH close waits for the upload, so all writing must be known here."""
        return self.passes and self.config.write_type != "CACHE_THROUGH"

    def closed(self, content: Content) -> None:
        """One open file of `content` ended."""
        if not content.files and self.contents.get(content.ino) is content:
            del self.contents[content.ino]
            if content.writing is None and not content.is_stale:
                self.recent.closed(content.ino, content.attr, content.layout)
            content.drop_slab()
            content.unpin()
        self.session.release(content.ino)

    async def with_home(self, ask: Callable[[int], Awaitable[T]]) -> T:
        """`ask` with the worker to write to. UnavailableError when there is none, after some patience
        where there were workers lately: in all for one outage, not for each of a thousand files."""
        while True:
            try:
                home = self.workers.local_worker_id or await self.workers.home()
                if not home:
                    raise UnavailableError(NO_WORKER)
                result = await ask(home)
            except UnavailableError:
                is_over = trio.current_time() + _RETRY_S > self._outage_deadline()
                if is_over or not self.workers.was_seen_lately:
                    raise
            else:
                self.outage_since_s = None
                return result
            await interrupt.pause(_RETRY_S)
            await self.workers.refresh()

    def _outage_deadline(self) -> float:
        """Until when to wait, after a failure now."""
        now = trio.current_time()
        if self.outage_since_s is None or now - self.outage_seen_at_s > OUTAGE_MEMORY_S:
            self.outage_since_s = now
        self.outage_seen_at_s = now
        return self.outage_since_s + self.config.patience_s
