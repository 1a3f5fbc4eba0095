"""One inode that this client has open: what its handles share.

Writing passes here between master and worker (`writing.Writing` is the worker's side). Transitions
(begin, seal, truncate) hold `lock`; reads and writes of bytes do not.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import msgspec
import trio

from alluxiofuse.client.core import Core
from alluxiofuse.client.persisting import UploadPatience
from alluxiofuse.client.quick_lock import QuickLock
from alluxiofuse.client.slabs import Slab
from alluxiofuse.client.writing import SealedMeanwhile, Writing
from alluxiofuse.errors import (
    AlluxioFuseError,
    ConnectionLost,
    FsError,
    NoSpaceError,
    PeerError,
    StaleError,
    UfsNotFoundError,
    UnavailableError,
)
from alluxiofuse.rpc import interrupt
from alluxiofuse.rpc.base import Connection
from alluxiofuse.wire import master_ops as ops
from alluxiofuse.wire.types import SUPERUSER, Attr, Layout
from alluxiofuse.wire.worker_ops import WriteEnd

if TYPE_CHECKING:
    from alluxiofuse.client.open_file import OpenFile

log = logging.getLogger(__name__)

WAIT_PERSISTED_S = 30.0
SYNC_WAIT_S = 5.0
_RETRY_S = 0.02
OTHER_HOME_S = 1.0
"""How long the home of a file that is still empty is waited for before another one is chosen."""


class Content:
    def __init__(self, core: Core, attr: Attr, layout: Layout, known_at: int) -> None:
        self.core = core
        self.ino = attr.ino
        self.attr = attr
        """As the master last said; `live_attr` adds what only this client knows."""
        self.layout = layout
        """Of sealed content, or of what another client writes; void while `writing`."""
        self.files: list[OpenFile] = []
        self.lock = QuickLock()
        self.writing: Writing | None = None
        self.pins: list[Slab] = []
        """Slabs that the kernel may have open: kept, whatever becomes of the content, until the last of
        `files` is released."""
        self.slab: Slab | None = None
        """Attached for reading `layout`'s container (while not `writing`)."""
        self._known_at = known_at
        """On the clock of `core.changes`: what has changed until then is in `attr` and `layout`."""
        self.data_event_count = 0
        """How often the master said that other sessions changed the content."""
        self.replaced: set[int] = set()
        """Containers whose object in the under storage was replaced: a file that has read from one
        must not go on with the next."""
        self.error: AlluxioFuseError | None = None
        """What a release or background commit failed with; the next flush or fsync raises it."""

    @property
    def is_stale(self) -> bool:
        """Attributes or content changed, or may have: ask the master before the next use. Stays so until
        its answer is here, for all who need it meanwhile."""
        return not self.core.changes.is_current(self._known_at, self.ino)

    def doubt(self) -> None:
        """From now on it is stale."""
        self.core.changes.note(self.ino)

    def _settle(self) -> None:
        """It has just changed by us, and what it is now is known here: answers to what was asked before are
        out of date, and no event says so (a session is not told of its own changes)."""
        self.core.changes.note(self.ino)
        self._known_at = self.core.changes.now

    @property
    def is_written(self) -> bool:
        return any(file.is_writer for file in self.files)

    @property
    def is_sealed(self) -> bool:
        """As far as is known, nobody writes it."""
        return self.writing is None and not self.layout.home

    @property
    def live_attr(self) -> Attr:
        writing = self.writing
        return self.attr if writing is None else self.overlay(self.attr)

    def overlay(self, attr: Attr) -> Attr:
        """Attributes from the master with what this client has written since."""
        writing = self.writing
        if writing is None:
            return attr
        written_ns = writing.written_ns
        return msgspec.structs.replace(
            attr,
            size=writing.size,
            mtime_ns=written_ns if written_ns > attr.mtime_set_at_ns else attr.mtime_ns,
            ctime_ns=max(attr.ctime_ns, written_ns),
            container=writing.container,
            home=writing.worker_id,
        )

    async def looked_at(self, attr: Attr) -> Attr:
        """`overlay`, with what the home says now where only that knows."""
        writing = self.writing
        if writing is not None:
            await writing.look()
        return self.overlay(attr)

    # --- what the master says -----------------------------------------------------------------------

    def heard(self, attr: Attr, layout: Layout, asked_at: int) -> bool:
        """The master's answer to what was asked at `asked_at`. False: more recent things are known."""
        if asked_at < self._known_at:
            return False
        self._known_at = asked_at
        self._take(attr, layout)
        return True

    def _take(self, attr: Attr, layout: Layout) -> None:
        """What this client writes itself it knows better."""
        self.attr = attr
        if self.writing is not None:
            return
        if layout.container != self.layout.container:
            self.drop_slab()
        self.layout = layout

    async def refresh(self, *, is_patient: bool = True) -> None:
        """Ask the master where the content is now. Not patient: ConnectionLost when it is away."""
        session, asked_at = self.core.session, self.core.changes.now
        request = ops.Open(SUPERUSER, session.id, self.ino, False)

        def late(_: ops.Opened) -> None:
            session.release(self.ino)

        if is_patient:
            opened = await session.call(request, is_idempotent=True, on_late=late)
        else:
            opened = await session.call_now(request, late)
        session.release(self.ino)
        self.heard(opened.attr, opened.layout, asked_at)

    async def source_changed(self, layout: Layout) -> bool:
        """The under storage has another version than `layout` says. False: no, only elsewhere or with other
        attributes, as it was renamed or changed here, which the master may not have noted yet. The
        master's errors when the object is gone."""
        session = self.core.session
        try:
            new = await session.call(
                ops.SourceChanged(session.id, self.ino, layout.container), is_idempotent=True
            )
        except (FsError, StaleError, UfsNotFoundError):
            self._replace(layout)
            raise
        is_other = new.container != layout.container
        if is_other:
            self._replace(layout)
        if self.layout is layout:
            attr = msgspec.structs.replace(self.attr, size=new.size, container=new.container)
            self._take(attr, new)
        return is_other

    def _replace(self, layout: Layout) -> None:
        self.replaced.add(layout.container)
        self.core.kernel_pages.forget(self.ino)

    def drop_slab(self) -> None:
        slab, self.slab = self.slab, None
        if slab is not None and slab not in self.pins:
            self.core.slabs.give_back(slab)

    def pin(self, slab: Slab) -> None:
        if slab not in self.pins:
            self.pins.append(slab)

    def unpin(self) -> None:
        """Nobody has the inode open any more."""
        pins, self.pins = self.pins, []
        for slab in pins:
            if slab.container == self.layout.container and self.is_sealed:
                self.core.slabs.give_back(slab)
            else:
                self.core.slabs.discard(slab)

    def discard_slab(self) -> None:
        """It is not what it was thought to be."""
        slab, self.slab = self.slab, None
        if slab is not None and slab not in self.pins:
            self.core.slabs.discard(slab)

    async def attached(self, layout: Layout, worker_id: int, connection: Connection) -> Slab | None:
        """`slab`, of this content at this worker; None: it can't be attached. StaleError: it was replaced."""
        async with self.lock:
            slab = self.slab
            if slab is not None:
                if slab.is_good and slab.container == layout.container and slab.worker_id == worker_id:
                    return slab
                self.drop_slab()
            if self.layout.container != layout.container or self.writing is not None:
                raise StaleError("the content was replaced meanwhile")
            self.slab = await self.core.slabs.attach(self.core.session.id, layout, worker_id, connection)
            return self.slab

    # --- writing ------------------------------------------------------------------------------------

    async def begun(self, reserve_bytes: int) -> Writing:
        """The write state, ready for bytes; use it before the next await."""
        while True:
            writing = self.writing
            if writing is not None and writing.takes_writes:
                return writing
            async with self.lock:
                await self._begin(reserve_bytes)

    async def _begin(self, reserve_bytes: int, *, is_truncating: bool = False) -> Writing:
        """Under the lock: assigned by the master and begun at the worker."""
        deadline = trio.current_time() + self.core.config.patience_s
        while True:
            writing = self.writing
            if writing is not None and (writing.is_over or writing.is_ending):
                await writing.end()
                await self._commit_end(writing)  # An earlier end or commit failed.
                writing = None
            if writing is None:
                writing = await self.assign(is_truncating=is_truncating)
            try:
                if not writing.is_begun:
                    # Nothing is at the home of an empty file yet: where it is away, another one will do.
                    patience_s = (
                        min(OTHER_HOME_S, deadline - trio.current_time()) if writing.is_empty else None
                    )
                    await writing.begin(reserve_bytes, patience_s)
                return writing
            except (ConnectionLost, UnavailableError):
                if not writing.is_empty or trio.current_time() + _RETRY_S > deadline:
                    raise
                other = await self.core.workers.home()
                if other not in (0, writing.worker_id):
                    await writing.end()
                    await self._commit_end(writing)
            except NoSpaceError:
                await self._abandon(writing)
                raise
            except StaleError as exc:
                # Another client has just sealed what we were to join, and the master hears of it soon; or
                # the worker came back without what we were to change.
                if writing.is_joined or writing.is_empty:
                    self._unassign()
                else:
                    await self._abandon(writing)
                if trio.current_time() + _RETRY_S > deadline:
                    raise UnavailableError(f"the only copy of the content is gone: {exc.message}") from None
            await interrupt.pause(_RETRY_S)

    def _unassign(self) -> None:
        """Forget a write state in which nothing was written."""
        self.writing = None
        self.doubt()
        self.core.kernel_pages.forget(self.ino)

    async def assign(self, *, is_truncating: bool) -> Writing:
        """Under the lock, while not writing: the master gives home and container."""
        session, heard = self.core.session, self.data_event_count
        layout = await self.core.with_home(
            lambda home: session.call(
                ops.BeginWrite(session.id, self.ino, home, is_truncating), is_idempotent=True
            )
        )
        # What was joined may have others' bytes, whatever the master knows of its size.
        is_empty = not layout.is_joined and (is_truncating or not layout.base_size)
        writing = Writing(self.core, layout, is_empty=is_empty)
        if heard != self.data_event_count:
            writing.doubt()  # News may overtake the answer.
        self.drop_slab()
        self.start(writing)
        pages = self.core.kernel_pages
        if layout.is_joined:
            pages.forget(self.ino)
        elif is_empty:
            pages.opened(self.ino, layout.container)  # The kernel empties it too.
        else:
            pages.written(self.ino, layout.base_container, layout.container, is_shared=layout.is_shared)
        return writing

    def start(self, writing: Writing) -> None:
        self.writing = writing
        self._settle()

    async def _abandon(self, writing: Writing) -> None:
        """The home has no room to begin: let the old content be the content again. A new or emptied
        file needs none: it stays assigned, and is committed empty."""
        if writing.is_empty:
            return
        if writing.is_joined:
            self._unassign()  # Others may have written to it.
            return
        old = self.layout
        try:
            await self._tell_abandoned(writing)
        except StaleError:
            self._unassign()  # Others have joined us, ended it and gone on: there is nothing to give back.
            return
        self.writing = None
        self.doubt()
        self.core.kernel_pages.written(self.ino, writing.container, old.container)

    async def seal(self) -> None:
        """End the writing of this client and tell the master. Nothing when there is none, and what the
        kernel writes goes on while it is open for writing."""
        async with self.lock:
            writing = self.writing
            if writing is None or (writing.is_passing and self.is_written):
                return
            try:
                await writing.end()
            except StaleError:
                if writing.is_begun:
                    raise
                self._unassign()  # Sealed by another client, and nothing of it was ours.
                return
            await self._commit_end(writing)

    async def _commit_end(self, writing: Writing) -> None:
        """Under the lock, after `writing.end`."""
        end = writing.result
        assert end is not None
        if end.is_reverted:
            await self._commit_reverted(writing)
            return
        asked_at = self.core.changes.now
        try:
            attr = await self._tell_end(writing, end)
            if writing.is_unbegun and attr.home and attr.container == writing.container:
                end = await writing.end_at_home()  # Others may be writing, or have just ended.
                attr = await self._tell_end(writing, end)
        except StaleError:
            if end.is_sealed and not writing.is_unbegun:
                raise
            # Who came last has sealed and committed it, with our bytes, and the next writing has begun; or
            # none of it was ours, and the master gave it up when our session had ended.
            self.give_up()
            return
        self.attr = attr
        self.writing = None
        home = 0 if end.is_sealed else writing.worker_id
        self.layout = Layout(
            self.ino, writing.container, end.size, self.layout.block_bytes, None, home, [writing.worker_id]
        )
        is_ours = attr.container == writing.container and attr.size == end.size and not attr.home
        is_news = not self.core.changes.is_current(asked_at, self.ino)
        self._settle()
        if is_news or not is_ours:
            self.doubt()  # Others write to it, or did.
        self.slab = writing.close()
        if self.slab is not None:
            self.core.slabs.adopt(self.slab)

    async def _commit_reverted(self, writing: Writing) -> None:
        """Under the lock: nothing was changed, and the worker has the base again."""
        old = self.layout
        try:
            self.attr = await self._tell_abandoned(writing)
        except StaleError as exc:
            log.info("inode %d was replaced while it was open for writing: %s", self.ino, exc)
            self.give_up()
            return
        self.writing = None
        self.doubt()
        self.core.kernel_pages.forget(self.ino)
        slab = writing.close()
        if slab is not None:
            slab.container = old.container
            self.slab = slab
            self.core.slabs.adopt(slab)

    async def _tell_abandoned(self, writing: Writing) -> Attr:
        """The base is the content again. StaleError: it was replaced meanwhile."""
        session = self.core.session
        request = ops.CommitContent(
            session.id,
            self.ino,
            writing.container,
            self.layout.size,
            self.attr.mtime_ns,
            is_sealed=False,
            is_abandoned=True,
        )
        return await session.call(request, is_idempotent=True)

    async def _tell_end(self, writing: Writing, end: WriteEnd) -> Attr:
        session = self.core.session
        return await session.call(
            ops.CommitContent(
                session.id,
                self.ino,
                writing.container,
                end.size,
                end.mtime_ns,
                end.is_sealed,
                is_unbegun=writing.is_unbegun,
            ),
            is_idempotent=True,
        )

    async def commit(self) -> None:
        """Let others see size and mtime so far; the file stays open for writing."""
        writing, session = self.writing, self.core.session
        if writing is None or not (writing.is_uncommitted or writing.is_passing):
            return
        writing.is_uncommitted = False
        try:
            await writing.look()
            state = writing.size, writing.written_ns
            if state == writing.told:
                return
            self.attr = await session.call(
                ops.CommitContent(session.id, self.ino, writing.container, *state, is_sealed=False),
                is_idempotent=True,
            )
            writing.told = state
        except BaseException:
            writing.is_uncommitted = True
            raise

    async def truncate(self, size: int) -> None:
        """To `size`, whatever is open."""
        while True:
            try:
                return await self._truncate(size)
            except SealedMeanwhile:
                continue

    async def _truncate(self, size: int) -> None:
        async with self.lock:
            is_emptying = size == 0 and self.writing is None
            try:
                writing = await self._begin(0, is_truncating=is_emptying)
            except NoSpaceError:
                # Emptying needs no room: it stays assigned, and is committed empty.
                if size == 0 and self.writing is not None and self.writing.is_empty:
                    return
                raise
            # Also when it began empty: we may have joined others, who wrote to it meanwhile.
            if writing.size or size or not is_emptying:
                await writing.truncate(size)

    async def wait_persisted(self) -> None:
        """Until the under storage has the content as of now; the errors of `UploadPatience`."""
        container, patience = self.attr.container, UploadPatience(self.core)
        while container and not await patience.is_persisted(self.ino, container, WAIT_PERSISTED_S):
            log.info("inode %d is still being persisted", self.ino)

    # --- close and fsync ----------------------------------------------------------------------------

    async def flush(self, file: OpenFile) -> None:
        """close(2) of a descriptor of `file`, which is open for writing."""
        self.raise_pending()
        if self.writing is None:
            intents = self.core.session.intents
            if self._waits_for_upload and intents is not None and intents.predecessor is not None:
                await self.wait_persisted()  # A predecessor may have sealed it, and died in here.
            return
        # Others that were flushed and not written to since are most likely closed, their release
        # on its way: whoever comes last seals.
        is_shared = any(one.is_writer and not one.is_flushed for one in self.files if one is not file)
        if self.writing.is_passing or is_shared:
            # Of a copy of its descriptor that goes on writing the kernel tells nothing before the release.
            await self.commit()
            return
        await self.seal()
        if self._waits_for_upload:
            await self.wait_persisted()

    @property
    def _waits_for_upload(self) -> bool:
        return self.core.config.write_type == "CACHE_THROUGH"

    async def fsync(self) -> None:
        """Bytes on a durable tier or in the under storage; size and mtime at the master. Its log is
        not synced here."""
        self.raise_pending()
        while True:
            writing = self.writing
            if writing is None:
                await self._sync_sealed()
                return
            try:
                is_durable = await writing.sync()
                break
            except SealedMeanwhile:
                is_durable = False
                break
            except StaleError:
                if self.writing is writing and not writing.is_ending:
                    raise
            # Ended by another task meanwhile: its bytes are where the content is now.
            async with self.lock:
                pass
        if is_durable:
            await self.commit()
        else:
            await self.seal()
            await self.wait_persisted()

    async def _sync_sealed(self) -> None:
        """What was written and sealed before may still be only in the page cache of its worker."""
        patience = UploadPatience(self.core)
        while True:
            if self.is_stale:
                await self.refresh()
            layout, slab = self.layout, self.slab
            if layout.source is not None or layout.home or not layout.container or not layout.size:
                return
            try:
                if slab is not None and slab.is_good and await slab.sync():
                    return
            except (StaleError, PeerError) as exc:
                log.debug("inode %d is not synced by its slab: %s", self.ino, exc)
            if await patience.is_persisted(self.ino, layout.container, SYNC_WAIT_S):
                return
            self.doubt()  # It may be open for writing elsewhere by now: then it is not for us.

    def raise_pending(self) -> None:
        error, self.error = self.error, None
        if error is not None:
            raise error

    async def last_writer_left(self) -> None:
        """Seal what the last flush could not. Never raises: nobody is there to be told."""
        try:
            await self.seal()
        except StaleError as exc:
            log.info("inode %d: %s", self.ino, exc)
            self.give_up()
        except AlluxioFuseError as exc:
            log.error("inode %d: its last writes may be lost: %s", self.ino, exc)
            self.error = exc
            self.give_up()

    def give_up(self) -> None:
        """Forget a write state that can't be ended or committed; the worker seals what it has by itself,
        and tells the master."""
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.abandon()
        self.core.kernel_pages.forget(self.ino)
        self.doubt()
