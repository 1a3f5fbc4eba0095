"""Loading metadata from under storages on first use, and comparing it again when it is old.

`ufs_freshness` decides what must be asked, this asks it in threads, once at a time for each directory or
name, and `ufs_compare` takes in what the answers say. Owned by the master's thread; nothing durable is
kept here.
"""

from __future__ import annotations

import logging
import stat
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import trio

from alluxiofuse.errors import StaleError, UfsError, UfsNotFoundError, UfsUnavailableError
from alluxiofuse.ids import DEFAULT_BLOCK_BYTES, ROOT_INO
from alluxiofuse.master import places
from alluxiofuse.master.clock import Clock
from alluxiofuse.master.mounts import MountTable
from alluxiofuse.master.persist_log import PersistLog
from alluxiofuse.master.records import InodeRecord
from alluxiofuse.master.store import Store, u64
from alluxiofuse.master.ufs_compare import Comparer, Dropper, Publisher, TreeHooks
from alluxiofuse.master.ufs_freshness import PAGE_ENTRIES, Freshness, remember
from alluxiofuse.ufs.base import ListPage, UfsEntry, UnderStorage

T = TypeVar("T")
log = logging.getLogger(__name__)

ENTRIES_PER_COMMIT = 1000
UNREACHABLE_S = 2.0
"""After a failed comparison what is known is served without asking, for this long."""
KNOWN_PATIENCE_S = 5.0
"""How long a comparison may take before what is known is served."""
FIRST_PATIENCE_S = 60.0
"""The same where nothing is known yet."""
SILENT_S = 30.0
"""As `UNREACHABLE_S`, after one that was given up: the next one is likely to take as long."""
_MAX_MOVES = 10


class _SilentStore(UfsUnavailableError):
    pass


class UfsLoader(Freshness):
    def __init__(
        self,
        store: Store,
        mounts: MountTable,
        persist_log: PersistLog,
        tree: TreeHooks,
        events: Publisher,
        workers: Dropper,
        clock: Clock,
        block_bytes: int = DEFAULT_BLOCK_BYTES,
    ) -> None:
        super().__init__(store, mounts, clock)
        self._recent = persist_log.recent
        self._comparer = Comparer(store, mounts, persist_log, tree, events, workers, clock, block_bytes)
        self._flights: dict[tuple[int, bytes | None], trio.Event] = {}
        """What is being asked now: (directory, name), or (inode, None)."""
        self._partial: OrderedDict[int, None] = OrderedDict()
        """Directories too large to be loaded by a lookup: single names are asked for."""
        self.failed_count = 0
        """Comparisons that failed and were answered from what is known."""

    # --- asking -----------------------------------------------------------------------------------

    async def load_child(self, parent: int, name: bytes) -> None:
        """Afterwards the name is in the namespace, or known to be absent. UfsError when nothing is
        known of it and the store can't be asked."""
        child = self._store.child(parent, name)
        if child is not None:
            await self.refresh(child)
            return
        record = self._directory(parent)
        if not record.is_loaded and parent not in self._partial:
            await self._load_first_page(parent)
            if self._directory(parent).is_loaded or self._store.child(parent, name) is not None:
                return
        if record.is_loaded and self._is_listing_cheaper(parent, record.mount_id):
            async with self._flight(parent, b"") as is_mine:
                if is_mine:
                    await self._load_directory(parent, pages=None, names_only=True)
            return
        async with self._flight(parent, name) as is_mine:
            if is_mine:
                await self._ask_name(parent, name)

    async def load_children(self, ino: int) -> None:
        """Afterwards all names are known and all entries compared, and `is_loaded` is set. UfsError
        when they never were known and the store can't be asked. If cancelled, what was entered stays,
        `is_loaded` is not set."""
        async with self._flight(ino, b"") as is_mine:
            if is_mine:
                await self._load_directory(ino, pages=None)

    async def refresh(self, ino: int, force: bool = False) -> None:
        """Compare one inode, or all of its directory when many of that were asked for one by one. A
        store that can't be asked leaves it as it is known."""
        record = self._store.inode(ino)
        if record is not None and not force and self._is_comparison_cheaper(record):
            await self.load_children(record.parent)
            if self._listed_left_s(record.parent) > 0:
                return
        async with self._flight(ino, None) as is_mine:
            if is_mine:
                await self._refresh(ino, force)

    async def source_changed(self, ino: int, container: int) -> None:
        """A reader met another version than the one it was told of. Afterwards the inode's container
        is a new one, or it is gone."""
        record = self._store.inode(ino)
        if record is not None and record.container == container:
            await self.refresh(ino, force=True)

    def vanished(self, ino: int) -> None:
        """The persister found that the store does not have it any more."""
        self._comparer.vanish(ino)

    async def _refresh(self, ino: int, force: bool) -> None:
        record = self._store.inode(ino)
        if record is None or not record.parent or not record.is_in_ufs:
            return
        path = places.location_path(self._store, ino, record)
        if path is None or (not force and self._store.get("persist", b"s" + u64(ino)) is not None):
            return
        token = self._recent.watch()
        try:
            entry = await self._ask(record.mount_id, lambda storage: storage.stat(path), is_known=True)
            self._comparer.meet(record.parent, record.name, ino, entry, token, force)
        except UfsNotFoundError:
            self._comparer.vanish(ino, path, token)
        except UfsError as exc:
            self._failed(record.mount_id, exc)
        finally:
            self._recent.end(token)

    async def _ask_name(self, parent: int, name: bytes) -> None:
        record = self._directory(parent)
        base = self._base(parent, record)
        if base is None:
            self._note_absent(parent, name)
            return
        path = places.join(base, name)
        token = self._recent.watch()
        try:
            entry = await self._ask(
                record.mount_id, lambda storage: storage.stat(path), is_known=record.is_loaded
            )
            now = self._store.inode(parent)
            if now is not None and self._base(parent, now) == base:
                self._comparer.apply(parent, base, [entry], token)
        except UfsNotFoundError:
            pass
        except UfsError as exc:
            if not record.is_loaded:
                raise
            self._failed(record.mount_id, exc)
        finally:
            self._recent.end(token)
        if self._store.child(parent, name) is None:
            self._note_absent(parent, name)

    async def _load_first_page(self, ino: int) -> None:
        """A first lookup: one page of the listing, which is all of a small directory."""
        async with self._flight(ino, b"") as is_mine:
            if is_mine and not self._directory(ino).is_loaded:
                await self._load_directory(ino, pages=1)

    async def _load_directory(self, ino: int, pages: int | None, names_only: bool = False) -> None:
        """List it; all over again when a rename moved it meanwhile. `names_only`: not when its
        fingerprint shows that the names are as they were."""
        for _ in range(_MAX_MOVES):
            record = self._directory(ino)
            base = self._base(ino, record)
            if base is None:
                self._set_loaded(ino, b"")
                return
            token = self._recent.watch()
            try:
                if await self._list(ino, record, base, token, pages, names_only):
                    return
            except UfsNotFoundError:
                self._comparer.vanish(ino, base, token)
                if self._store.inode(ino) is None or record.is_loaded:
                    return
                self._set_loaded(ino, b"")
            except UfsError as exc:
                if not record.is_loaded:
                    raise
                self._failed(record.mount_id, exc)
                return
            finally:
                self._recent.end(token)

    async def _list(
        self, ino: int, record: InodeRecord, base: bytes, token: int, pages: int | None, names_only: bool
    ) -> bool:
        """False: it was moved meanwhile."""
        fingerprint = b""
        if self._mounts.capabilities(record.mount_id).has_directories:
            seen_now = await self._ask(record.mount_id, lambda s: s.stat(base), is_known=record.is_loaded)
            fingerprint = seen_now.fingerprint
            is_same = bool(fingerprint) and fingerprint == record.listing_fingerprint
            if record.is_loaded and is_same and names_only:
                self._note_same(ino)
                self._set_loaded(ino, fingerprint)
                return True
        began_ns, began_s = self._clock.now_ns(), self._clock.monotonic()
        seen: set[bytes] = set()
        next_token: str | None = None
        while True:
            page = await self._ask(record.mount_id, _lister(base, next_token), is_known=record.is_loaded)
            if not await self._apply(ino, base, page.entries, token):
                return self._store.inode(ino) is None
            seen.update(entry.path.rpartition(b"/")[2] for entry in page.entries)
            next_token = page.next_token
            if next_token is None:
                break
            if pages is not None and len(seen) >= pages * PAGE_ENTRIES:
                remember(self._partial, ino, None)
                return True
        self._vanish_unseen(ino, base, seen, token)
        self._note_listed(ino, len(seen))
        self._note_compared(ino, record.mount_id, began_ns, self._clock.monotonic() - began_s)
        self._set_loaded(ino, fingerprint)
        return True

    async def _apply(self, ino: int, base: bytes, entries: list[UfsEntry], token: int) -> bool:
        """A page, in transactions of bounded size. False: the directory was moved or removed."""
        for start in range(0, len(entries), ENTRIES_PER_COMMIT):
            if start:
                await trio.lowlevel.checkpoint()
            now = self._store.inode(ino)
            if now is None or self._base(ino, now) != base:
                return False
            self._comparer.apply(ino, base, entries[start : start + ENTRIES_PER_COMMIT], token)
        return True

    def _vanish_unseen(self, ino: int, base: bytes, seen: set[bytes], token: int) -> None:
        unseen: list[bytes] = []
        for name, _ in self._store.scan("edge", u64(ino)):
            if name not in seen:
                unseen.append(name)
        for start in range(0, len(unseen), PAGE_ENTRIES):
            self._comparer.vanish_names(ino, base, unseen[start : start + PAGE_ENTRIES], token)

    # --- within -----------------------------------------------------------------------------------

    def _directory(self, ino: int) -> InodeRecord:
        record = self._store.inode(ino)
        if record is None:
            raise StaleError(f"inode {ino} is gone")
        return record

    def _base(self, ino: int, record: InodeRecord) -> bytes | None:
        """Where the store has the directory; None when what is at that path is another one's that
        has not been moved away yet, or when the store has nothing of it."""
        if not stat.S_ISDIR(record.mode) or record.is_local_only:
            return None
        if places.is_mount_root(self._store, ino, record):
            return b""
        base = places.location_path(self._store, ino, record)
        if base is None or not record.is_in_ufs:
            return None
        anchor = self._anchor(ino, record)
        deepest: int | None = None
        for prefix in (*places.prefixes(base), base):
            deepest = places.located_at(self._store, record.mount_id, prefix) or deepest
        return base if (deepest or 0) == anchor else None

    def _anchor(self, ino: int, record: InodeRecord) -> int:
        """The directory, itself or above, whose override gives it its location; 0: none."""
        at, now = ino, record
        while now.location is None and at != ROOT_INO:
            above = self._store.inode(now.parent) if now.parent else None
            if above is None or above.mount_id != record.mount_id:
                return 0
            at, now = now.parent, above
        return at if now.location is not None else 0

    def _set_loaded(self, ino: int, fingerprint: bytes) -> None:
        tx = self._store.transaction()
        record = tx.inode(ino)
        if record is not None:
            record.is_loaded = True
            record.listing_fingerprint = fingerprint
            record.listed_at_ns = record.checked_at_ns = self._clock.now_ns()
            tx.put_inode(ino, record)
            tx.commit()
        self._partial.pop(ino, None)

    def _failed(self, mount_id: int, exc: UfsError) -> None:
        self.failed_count += 1
        pause_s = SILENT_S if isinstance(exc, _SilentStore) else UNREACHABLE_S
        self._note_unreachable(mount_id, pause_s)
        log.warning("comparing with mount %d failed: %s", mount_id, exc.message or exc.code)

    async def _ask(self, mount_id: int, work: Callable[[UnderStorage], T], *, is_known: bool) -> T:
        """`is_known`: something can be answered without it, so a silent store is waited for as long as a
        program can bear, not until the connector gives up. Reads only: its thread is left to itself."""
        storage, limiter = self._mounts.storage(mount_id), self._mounts.limiter(mount_id)
        patience_s = KNOWN_PATIENCE_S if is_known else FIRST_PATIENCE_S
        with trio.move_on_after(patience_s):
            return await trio.to_thread.run_sync(work, storage, limiter=limiter, abandon_on_cancel=True)
        raise _SilentStore(f"{storage.uri} did not answer within {patience_s:g} s")

    @asynccontextmanager
    async def _flight(self, ino: int, name: bytes | None) -> AsyncIterator[bool]:
        """One at a time for each key. False: somebody else has just done it."""
        key = (ino, name)
        running = self._flights.get(key)
        if running is not None:
            await running.wait()
            yield False
            return
        done = self._flights[key] = trio.Event()
        try:
            yield True
        finally:
            del self._flights[key]
            done.set()


def _lister(base: bytes, token: str | None) -> Callable[[UnderStorage], ListPage]:
    return lambda storage: storage.list(base, token, PAGE_ENTRIES)


__all__ = ["UfsLoader"]
