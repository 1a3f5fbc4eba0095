"""Content of files: open, begin to write, seal, release; and where the bytes are.

A file is sealed, or it has a home: the one worker at which it is written and read until the last
writer's seal. What is dirty (not in the under storage) can only go on at the worker that holds it.
Methods are synchronous steps (see `loading`); none awaits.
"""

from __future__ import annotations

import errno
import logging
import stat
from functools import partial
from typing import Protocol

from alluxiofuse.errors import FsError, StaleError, UnavailableError
from alluxiofuse.master import places
from alluxiofuse.master.changes import Changes
from alluxiofuse.master.containers import forget_container, give_container, new_container, owner
from alluxiofuse.master.events import Events
from alluxiofuse.master.namespace import Namespace, check_name
from alluxiofuse.master.permissions import EXECUTE, READ, WRITE, require
from alluxiofuse.master.persist_log import PersistLog
from alluxiofuse.master.persist_plan import is_clean
from alluxiofuse.master.records import InodeRecord
from alluxiofuse.master.replies import Replies
from alluxiofuse.master.sessions import Sessions
from alluxiofuse.master.store import Store, Transaction, u64
from alluxiofuse.master.tree import OPEN
from alluxiofuse.wire.master_ops import BeginWrite, CommitContent, Create, Created, Open, Opened, Release
from alluxiofuse.wire.messages import NOTHING, Nothing
from alluxiofuse.wire.types import EVENT_DATA, Attr, Event, Layout, OrphanSeal, UfsSource

log = logging.getLogger(__name__)

JUST_NOW_S = 0.5
"""Far shorter than a silence after which a worker counts as back."""


class Workers(Protocol):
    """What is needed of `workers.WorkerRegistry`."""

    def choose_home(self, preferred: int) -> int: ...

    def is_alive(self, worker_id: int) -> bool: ...

    def was_heard_lately(self, worker_id: int) -> bool: ...

    def holders(self, container: int) -> list[int]: ...

    def blocks_of(self, container: int) -> dict[int, bytes]: ...

    def has_container(self, worker_id: int, container: int) -> bool: ...

    def has_told_all(self, worker_id: int, since_s: float) -> bool: ...

    def drop_container(self, container: int, also: int = 0) -> None: ...

    def sealed(self, worker_id: int, container: int) -> None: ...


class Content:
    def __init__(
        self,
        namespace: Namespace,
        changes: Changes,
        sessions: Sessions,
        replies: Replies,
        workers: Workers,
        persist_log: PersistLog,
        events: Events,
        block_bytes: int,
    ) -> None:
        self._namespace = namespace
        self._changes = changes
        self._store: Store = namespace.store
        self._tree = namespace.tree
        self._sessions = sessions
        self._replies = replies
        self._workers = workers
        self._persist_log = persist_log
        self._events = events
        self._block_bytes = block_bytes
        self._suspects: dict[int, float] = {}
        """Files open for writing whose home is alive and has nothing of it, while no session has them
        open; since when (monotonic)."""

    # --- where it is ------------------------------------------------------------------------------

    def layout(self, ino: int, record: InodeRecord) -> Layout:
        """How to reach the content now."""
        layout = Layout(
            ino, record.container, record.size, record.block_bytes or self._block_bytes, None, record.home, []
        )
        layout.is_shared = record.is_shared
        if record.home:
            if record.base_container and record.size:
                layout.base_container, layout.base_size = record.base_container, record.base_size
                layout.source = self._source(ino, record, record.base_container)
            else:  # It starts empty: what it was made from matters to those who read that.
                layout.emptied_container = record.base_container
        elif record.container:
            layout.workers = self._holders(record)
            # Of an orphan the object may be another file's by now: who has all of it needs none.
            if record.nlink or not self._whole_at(record):
                layout.source = self._source(ino, record, record.container)
        return layout

    def _whole_at(self, record: InodeRecord) -> int:
        """An alive worker that has all blocks of the content; 0: none."""
        block_bytes = record.block_bytes or self._block_bytes
        count = -(-record.size // block_bytes)
        for worker_id, blocks in self._workers.blocks_of(record.container).items():
            if int.from_bytes(blocks, "little").bit_count() == count:
                return worker_id
        return 0

    def _source(self, ino: int, record: InodeRecord, container: int) -> UfsSource | None:
        if not record.is_in_ufs or record.ufs_container != container:
            return None
        path = places.location_path(self._store, ino, record)
        if path is None:
            return None
        return UfsSource(record.mount_id, path, record.ufs_size, record.fingerprint)

    def _holders(self, record: InodeRecord) -> list[int]:
        """Alive workers that have it, the one that surely has all of it first."""
        found = self._workers.holders(record.container)
        first = 0 if is_clean(record) else record.held_by
        if first and self._workers.is_alive(first):
            return [first, *(w for w in found if w != first)]
        return found

    # --- opening ----------------------------------------------------------------------------------

    def open(self, req: Open) -> Opened:
        session = self._sessions.touch(req.session_id)
        session.passes_at = req.passes_at or session.passes_at
        record = self._namespace.existing(req.ino)
        self._check_open(req, record)
        self._namespace.gate.fresh(req.ino, record)
        self._sessions.add_open(req.session_id, req.ino)
        return Opened(self._namespace.attr(req.ino, record), self.layout(req.ino, record))

    def _check_open(self, req: Open, record: InodeRecord) -> None:
        if stat.S_ISLNK(record.mode):
            raise FsError(errno.ELOOP)
        if req.for_write:
            if stat.S_ISDIR(record.mode):
                raise FsError(errno.EISDIR)
            self._namespace.require_writable(record)
        require(req.who, record, WRITE if req.for_write else READ)

    def create(self, req: Create) -> Created:
        self._sessions.require_room(req.session_id)
        check_name(req.name)
        tx = self._store.transaction()
        parent_record = self._tree.directory(tx, req.parent)
        require(req.who, parent_record, EXECUTE)
        child = tx.child(req.parent, req.name)
        self._namespace.gate.child(req.parent, parent_record, req.name, child)
        if child is not None:
            if req.exclusive:
                raise FsError(errno.EEXIST)
            opened = self.open(Open(req.who, req.session_id, child, bool(req.home)))
            return Created(opened.attr, opened.layout, False)
        self._namespace.require_writable(parent_record)
        require(req.who, parent_record, WRITE | EXECUTE)
        return self._create_new(tx, req, parent_record)

    def _create_new(self, tx: Transaction, req: Create, parent_record: InodeRecord) -> Created:
        record = self._changes.new_record(req.who, parent_record, stat.S_IFREG | req.mode & 0o7777)
        record.block_bytes = self._block_bytes
        if req.home:
            record.home = self._workers.choose_home(req.home)
            record.container = new_container(self._store)
        ino = self._tree.insert(tx, req.parent, parent_record, req.name, record)
        if record.home:
            tx.put("meta", OPEN + u64(ino), b"")
        created = Created(self._namespace.attr(ino, record), self.layout(ino, record), True)
        self._changes.finish_insert(tx, req.session_id, req.parent, req.name, created)
        self._sessions.add_open(req.session_id, ino)
        if record.home:
            self._sessions.add_writer(req.session_id, ino, record.container)
        return created

    def created_before(self, req: Create, created: Created) -> Created:
        """The answer to a Create that was carried out before. The session has been taken up since, when
        its client did not know yet that it had the file open. StaleError: it is gone already."""
        ino = created.attr.ino
        record = self._namespace.existing(ino)
        self._sessions.add_open(req.session_id, ino)
        if record.home and record.container == created.layout.container:
            self._sessions.add_writer(req.session_id, ino, record.container)
        return Created(self._namespace.attr(ino, record), self.layout(ino, record), True)

    def release(self, req: Release) -> Nothing:
        for ino in req.inos:
            if self._sessions.release(req.session_id, ino):
                self._tree.released(ino)
        return NOTHING

    # --- writing ----------------------------------------------------------------------------------

    def begin_write(self, req: BeginWrite) -> Layout:
        self._sessions.touch(req.session_id)
        tx = self._store.transaction()
        record = self._file(tx, req.ino)
        self._namespace.require_writable(record)
        if record.home and not (req.truncate and not self._workers.was_heard_lately(record.home)):
            self._require_alive(record.home, req.ino)
            self._join(tx, req, record)
            layout = self.layout(req.ino, record)
            layout.is_joined = True
            return layout
        base_is_shared, record.is_shared = record.is_shared, False
        if record.home:
            self._forget_open(tx, req.ino, record)
            record.home = self._workers.choose_home(req.home)
        else:
            record.home = self._choose_home(req, record)
            record.base_container, record.base_size = record.container, record.size
        record.container = new_container(self._store)
        give_container(tx, record.container, req.ino)
        record.mtime_set_at_ns = 0
        if req.truncate:
            record.size = 0
            record.mtime_ns = record.ctime_ns = self._namespace.clock.now_ns()
        tx.put("meta", OPEN + u64(req.ino), b"")
        tx.put_inode(req.ino, record)
        layout = self.layout(req.ino, record)
        layout.is_shared = base_is_shared
        tx.commit(layout)
        self._sessions.add_writer(req.session_id, req.ino, record.container)
        self._events.publish(req.session_id, Event(EVENT_DATA, req.ino))
        return layout

    def begun_before(self, req: BeginWrite, layout: Layout) -> Layout:
        """The answer to a BeginWrite that was carried out before; anew when that writing is over."""
        record = self._namespace.existing(req.ino)
        if record.container != layout.container or not record.home:
            return self.begin_write(req)
        self._sessions.add_writer(req.session_id, req.ino, record.container)
        layout.is_joined = layout.is_joined or record.is_shared
        return layout

    def _forget_open(self, tx: Transaction, ino: int, record: InodeRecord) -> None:
        """What is being written at a silent home is not wanted any more; those who write it are told at
        their next commit. The base stays what it was."""
        container, home = record.container, record.home
        forget_container(tx, container)
        tx.after_commit(partial(self._sessions.clear_writers, ino, container))
        tx.after_commit(partial(self._workers.drop_container, container, home))

    def _join(self, tx: Transaction, req: BeginWrite, record: InodeRecord) -> None:
        """One more session writes to the open container: from now on none of them knows it whole, and
        what their kernels cached of their own writing is void."""
        if self._sessions.writes(req.session_id, req.ino) == record.container:
            return
        if not record.is_shared:
            record.is_shared = True
            tx.put_inode(req.ino, record)
            tx.commit()
        self._sessions.add_writer(req.session_id, req.ino, record.container)
        self._events.publish(req.session_id, Event(EVENT_DATA, req.ino))

    def _file(self, tx: Transaction, ino: int) -> InodeRecord:
        record = self._tree.record(tx, ino)
        if not stat.S_ISREG(record.mode):
            raise FsError(errno.EISDIR if stat.S_ISDIR(record.mode) else errno.EINVAL)
        return record

    def _choose_home(self, req: BeginWrite, record: InodeRecord) -> int:
        """Any worker may take clean, empty or unwanted content; dirty content binds to its worker."""
        is_free = req.truncate or not record.size or not record.container or is_clean(record)
        if is_free and not req.truncate and not record.nlink and (home := self._whole_at(record)):
            return home
        if is_free:
            return self._workers.choose_home(self._open_at(req, record) or req.home)
        holders = [record.held_by] if record.held_by else self._workers.holders(record.container)
        home = holders[0] if holders else 0
        self._require_alive(home, req.ino)
        return home

    def _open_at(self, req: BeginWrite, record: InodeRecord) -> int:
        """The worker at which others' kernels read the content by themselves, which see only what changes
        there; 0: none, or the writer's own is one of them."""
        readers = self._sessions.read_at(req.ino, req.session_id) if record.container else set()
        having = [
            one
            for one in readers
            if self._workers.is_alive(one)
            # What it has sealed it reports a moment later.
            and (one == record.held_by or self._workers.has_container(one, record.container))
        ]
        return 0 if not having or req.home in having else having[0]

    def _require_alive(self, worker_id: int, ino: int) -> None:
        if not self._workers.is_alive(worker_id):
            raise UnavailableError(
                f"the worker that alone has the newest content of inode {ino} is not running"
                + (f" (worker {worker_id})" if worker_id else "")
            )

    def commit_content(self, req: CommitContent) -> Attr:
        """SessionExpiredError: nothing is lost, commit in a new session."""
        self._sessions.touch(req.session_id)
        tx = self._store.transaction()
        record = self._file(tx, req.ino)
        size = self._sealed_size(req, record)
        if size is not None and req.is_sealed and not req.is_unbegun and req.mtime_ns and req.size != size:
            # The worker had evicted it since, and took the writer for the first one.
            raise StaleError(f"the content of inode {req.ino} had been sealed with another size")
        if record.container != req.container and (size is None or not req.is_sealed):
            raise StaleError(f"the content of inode {req.ino} was replaced meanwhile")
        if size is not None:  # A repetition, or the word of another came first.
            return self._namespace.attr(req.ino, record)
        if req.is_abandoned:
            if self._sessions.end_writer(req.session_id, req.ino):
                self.revert(tx, req.ino, record, req.session_id)
                tx.commit(self._namespace.attr(req.ino, record))
            return self._namespace.attr(req.ino, record)
        is_alone = not record.is_shared and self._sessions.writes(req.session_id, req.ino) == req.container
        if is_alone or not req.is_unbegun:
            return self._commit(tx, req.session_id, req.ino, record, req.size, req.mtime_ns, req.is_sealed)
        return self._namespace.attr(req.ino, record)

    def _sealed_size(self, req: CommitContent, record: InodeRecord) -> int | None:
        """With how many bytes `req.container` is known to have been sealed, perhaps long ago."""
        if record.container == req.container:
            return None if record.home else record.size
        if record.base_container == req.container:
            return record.base_size
        return self._sessions.sealed_size(req.session_id, req.ino, req.container)

    def orphan_sealed(self, seal: OrphanSeal, worker_id: int) -> None:
        """A worker sealed a container on its own, or doubts that its writer told us. Idempotent: one
        that was sealed here too, or is the base of a newer one, changes nothing; one that nobody has
        is dropped there."""
        ino = owner(self._store, seal.container)
        tx = self._store.transaction()
        record = None if ino is None else tx.inode(ino)
        if ino is None or record is None:
            self._workers.drop_container(seal.container, worker_id)
        elif record.container == seal.container and record.home == worker_id:
            self._commit(tx, 0, ino, record, seal.size, seal.mtime_ns, is_sealed=True)
        elif record.container == seal.container and not is_clean(record) and record.size != seal.size:
            # The worker lost its seal, and so perhaps bytes that were never synced, with the power.
            log.error(
                "inode %d is %d bytes long, not %d: its worker lost the rest", ino, seal.size, record.size
            )
            self._commit(tx, 0, ino, record, seal.size, seal.mtime_ns, is_sealed=False)

    def _commit(
        self,
        tx: Transaction,
        session_id: int,
        ino: int,
        record: InodeRecord,
        size: int,
        mtime_ns: int,
        is_sealed: bool,
    ) -> Attr:
        """Of a file that has a home."""
        record.size = size
        if mtime_ns > record.mtime_set_at_ns:
            record.mtime_ns = record.mtime_set_at_ns = mtime_ns
            # As it was before the commit for those who asked the home: closing changes no times.
            record.ctime_ns = max(record.ctime_ns, mtime_ns)
        if is_sealed:
            self._seal(tx, ino, record)
        tx.put_inode(ino, record)
        attr = self._namespace.attr(ino, record)
        # Of what is still open the home knows size and time, and seals it when we have forgotten them.
        tx.commit(attr, is_recoverable=not is_sealed and record.home != 0)
        if is_sealed:
            self._persist_log.wake()
        self._events.publish(session_id, Event(EVENT_DATA, ino))
        return attr

    def _seal(self, tx: Transaction, ino: int, record: InodeRecord) -> None:
        home, base, base_holder = record.home, record.base_container, record.held_by or record.home
        record.held_by = home
        record.home = record.base_container = record.base_size = record.mtime_set_at_ns = 0
        tx.delete("meta", OPEN + u64(ino))
        tx.after_commit(partial(self._workers.sealed, home, record.container))
        if base:
            forget_container(tx, base)
            tx.after_commit(partial(self._workers.drop_container, base, base_holder))
        if record.nlink:
            self._persist_log.content_committed(tx, ino, record)
        tx.after_commit(partial(self._sessions.clear_writers, ino, record.container, record.size))

    def revert(self, tx: Transaction, ino: int, record: InodeRecord, session_id: int = 0) -> None:
        """The home never heard of `record.container`: nothing was written, the base is the content
        again. The caller commits; sessions are told by an event, but for `session_id`, which asked for it: it
        would take that for news of its next writing, and doubt it."""
        container, home = record.container, record.home
        record.container, record.size = record.base_container, record.base_size
        record.home = record.base_container = record.base_size = record.mtime_set_at_ns = 0
        tx.delete("meta", OPEN + u64(ino))
        forget_container(tx, container)
        give_container(tx, record.container, ino)
        tx.put_inode(ino, record)
        tx.after_commit(partial(self._sessions.clear_writers, ino, container))
        tx.after_commit(partial(self._workers.drop_container, container, home))
        tx.after_commit(lambda: self._tell(ino, session_id))
        # What it lacks in the under storage waited for the end of this writing.
        tx.after_commit(partial(self._persist_log.touch, ino))

    def _tell(self, ino: int, session_id: int = 0) -> None:
        self._events.publish(session_id, Event(EVENT_DATA, ino))

    # --- sessions ---------------------------------------------------------------------------------

    def end_session(self, session_id: int) -> None:
        """Everything that the session held ends: watches, opens, orphans that only it had open. What
        it was writing is sealed by the worker, which notices that its connection is gone."""
        session = self._sessions.remove(session_id)
        self._events.forget(session_id)
        self._replies.forget(session_id)
        if session is not None:
            for ino in session.opens:
                if not self._sessions.is_open(ino):
                    self._tree.released(ino)

    def sweep(self) -> None:
        """Called every second or so. End sessions whose lease ran out; once sessions of the life
        before can't come back any more, free orphans that nobody has open and give up writes that
        never began."""
        for session_id in self._sessions.expired():
            self._sessions.expired_count += 1
            self.end_session(session_id)
        self._replies.sweep()
        if self._sessions.is_recovering:
            return
        for ino in [i for i in self._tree.orphans if not self._sessions.is_open(i)]:
            self._tree.released(ino)
        now = self._namespace.clock.monotonic()
        found = self._never_begun()
        self._suspects = {ino: self._suspects.get(ino, now) for ino in found}
        for ino, since in list(self._suspects.items()):
            # A home that is cut off may have it, and not have told of it.
            is_told = self._workers.has_told_all(found[ino], since)
            if is_told and now - since >= self._sessions.lease_s:
                self._revert(ino)

    def worker_ready(self, worker_id: int) -> None:
        """A worker has reported all that it has, so what it lacks it never heard of."""
        just_now_s = self._namespace.clock.monotonic() - JUST_NOW_S
        if not self._sessions.is_recovering and self._workers.has_told_all(worker_id, just_now_s):
            for ino, home in self._never_begun().items():
                if home == worker_id:
                    self._revert(ino)

    def _never_begun(self) -> dict[int, int]:
        """Files whose writer vanished between telling the master and telling the home, and their home."""
        found = {}
        for key, _ in self._store.scan("meta", OPEN):
            ino = int.from_bytes(key, "big")
            record = self._store.inode(ino)
            if record is None or not record.home or self._sessions.is_open(ino):
                continue
            is_there = self._workers.has_container(record.home, record.container)
            if not is_there and self._workers.is_alive(record.home):
                found[ino] = record.home
        return found

    def _revert(self, ino: int) -> None:
        tx = self._store.transaction()
        record = tx.inode(ino)
        if record is not None and record.home:
            self.revert(tx, ino, record)
            tx.commit()
