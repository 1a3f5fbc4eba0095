"""What the next daemon of a mount must know, in a memfd that the keeper holds (docs/adr/0002-keeper.md).

A record is made valid by its last store and void by its first one, so one that a kill has torn is none.
Nothing is sent to anybody: a few stores into mapped memory for each open and close, and for each
change. What is not used takes no memory.

    0          header: magic, format, life, session, events heard, how many handle records were in use
    4 KiB      intents: `client.intents`
    1 MiB      handles
    128 MiB    of open directories: the names of the last two replies to a listing
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from struct import Struct
from typing import NamedTuple

from alluxiofuse.client.intents import CHANGE, Predecessor, asked_by
from alluxiofuse.errors import UserError

FORMAT = 2
"""Of all that one daemon leaves to the next."""
_MAGIC = b"AF-KEPT\0"
_START = Struct("=8sQ")
_LIFE, _SESSION, _EVENT_SEQ, _HANDLE_COUNT = 16, 24, 32, 40
_U64 = Struct("=Q")

_INTENTS_AT = 4096
_INTENT = Struct("=QQQQ")
"""unique (0: void), kind, and what `IntentLog.note` says."""
MAX_INTENTS = 4096

_HANDLES_AT = 1 << 20
_HANDLE = Struct("=QQIIiIQQQ")
"""fh (0: void), inode, open(2)'s flags, bits, backing id, thread, st_dev and st_ino of the backing file,
unique of the request that opened it."""
_HANDLE_BYTES = 64
INDEX_BITS = 20
_COUNT_BITS = 28
"""A handle's number: life, a count, index of its record; so it is not used again."""
MAX_HANDLES = (1 << INDEX_BITS) - 1
"""One index stands for handles without a record, which end with the daemon."""

_LISTINGS_AT = 128 << 20
_LISTING_BYTES = 64 << 10
_LISTING = Struct("=QQII")
"""1 + index of the first name (0: void), fh, how many names, how many bytes."""
MAX_LISTINGS = 8192
SIZE = _LISTINGS_AT + MAX_LISTINGS * 2 * _LISTING_BYTES
MAX_LISTED_BYTES = _LISTING_BYTES - _LISTING.size - 1024
"""Replies to listings are no longer, so that their names fit."""

IS_DIRECTORY, KILLS_PRIVILEGES, IS_WRITTEN, IS_DIRECT = 1, 2, 4, 8


class HandleRecord(NamedTuple):
    ino: int
    flags: int = 0
    bits: int = 0
    backing_id: int = 0
    thread: int = 0
    device: int = 0
    device_ino: int = 0


class Former(NamedTuple):
    """A handle that the kernel holds since an earlier life."""

    fh: int
    record: HandleRecord


def make() -> int:
    """A new one: its descriptor."""
    fd = os.memfd_create("alluxiofuse-mount", os.MFD_CLOEXEC)
    os.ftruncate(fd, SIZE)
    os.pwrite(fd, _START.pack(_MAGIC, FORMAT), 0)
    return fd


class Memory:
    """One life's view of it; see also `client.intents.IntentLog`. UserError: not one of ours."""

    def __init__(self, fd: int) -> None:
        if os.fstat(fd).st_size != SIZE or os.pread(fd, _START.size, 0) != _START.pack(_MAGIC, FORMAT):
            raise UserError("this mount was begun by another version: unmount it and mount it again")
        self._map = mmap.mmap(fd, SIZE)
        self.life = self._get(_LIFE) + 1
        self._set(_LIFE, self.life)
        self._next = (self.life & 0xFFFF) << _COUNT_BITS
        self._free: list[int] = []
        self._count = min(self._get(_HANDLE_COUNT), MAX_HANDLES)
        self.former_handles = list(self._read_handles())
        self._unanswered = {unique: fh for fh, unique in self._opened_by() if unique}
        self._intents: list[int] = []
        """Free indices."""
        self._former: dict[int, list[tuple[int, int, int, int]]] = {}
        """unique -> (index, kind, first, second), of earlier lives, the last number last."""
        self._under_way: dict[int, list[int]] = {}
        """unique -> indices of its notes, of requests that are not answered yet."""
        self._ends: dict[int, list[Callable[[], None]]] = {}
        self.reserved_slots: set[int] = set()
        self._read_intents()
        self.predecessor: Predecessor | None = None
        if self.life > 1:
            inos = [one.record.ino for one in self.former_handles if not one.record.bits & IS_DIRECTORY]
            self.predecessor = Predecessor(self._get(_SESSION), self._get(_EVENT_SEQ), inos)

    def close(self) -> None:
        self._map.close()

    def _get(self, at: int) -> int:
        return int(_U64.unpack_from(self._map, at)[0])

    def _set(self, at: int, value: int) -> None:
        _U64.pack_into(self._map, at, value)

    def remember_session(self, session_id: int, event_seq: int) -> None:
        self._set(_SESSION, session_id)
        self._set(_EVENT_SEQ, event_seq)

    # --- handles ------------------------------------------------------------------------------------

    def _read_handles(self) -> Iterator[Former]:
        for index in range(self._count):
            fh, *fields = _HANDLE.unpack_from(self._map, _HANDLES_AT + index * _HANDLE_BYTES)
            if fh and fh & MAX_HANDLES == index:
                ino, flags, bits, backing_id, thread, device, device_ino, _ = fields
                yield Former(fh, HandleRecord(ino, flags, bits, backing_id, thread, device, device_ino))
            else:
                self._free.append(index)

    def _opened_by(self) -> Iterator[tuple[int, int]]:
        for one in self.former_handles:
            at = _HANDLES_AT + (one.fh & MAX_HANDLES) * _HANDLE_BYTES
            yield one.fh, _HANDLE.unpack_from(self._map, at)[-1]

    def add_handle(self, record: HandleRecord) -> int:
        """Its number. Before the open is answered."""
        self._next += 1
        if self._free:
            index = self._free.pop()
        elif self._count < MAX_HANDLES:
            index = self._count
            self._count += 1
            self._set(_HANDLE_COUNT, self._count)
        else:
            return self._next << INDEX_BITS | MAX_HANDLES
        fh = self._next << INDEX_BITS | index
        at = _HANDLES_AT + index * _HANDLE_BYTES
        _HANDLE.pack_into(self._map, at, 0, *record, asked_by.get())
        _U64.pack_into(self._map, at, fh)
        return fh

    def remove_handle(self, fh: int) -> None:
        """Once it is released."""
        index = fh & MAX_HANDLES
        if index != MAX_HANDLES:
            _U64.pack_into(self._map, _HANDLES_AT + index * _HANDLE_BYTES, 0)
            self._free.append(index)

    def unanswered_handle(self, unique: int) -> int:
        """The handle that an earlier life made for a request which comes again, so that the kernel has never
        heard of it; 0: none."""
        return self._unanswered.pop(unique, 0)

    # --- listings -----------------------------------------------------------------------------------

    def note_listing(self, fh: int, turn: int, start: int, names: list[bytes]) -> None:
        """Before a reply to a listing is sent: the names in it, the first of which is entry `start`. The
        kernel comes back to one of them or, when the reply does not reach it, to one of the reply before:
        that of the other `turn` is kept."""
        at = self._listing_at(fh, turn)
        if at < 0:
            return
        blob = b"\0".join(names)
        _U64.pack_into(self._map, at, 0)
        if len(blob) > _LISTING_BYTES - _LISTING.size:
            return
        self._map[at + _LISTING.size : at + _LISTING.size + len(blob)] = blob
        _LISTING.pack_into(self._map, at, 0, fh, len(names), len(blob))
        _U64.pack_into(self._map, at, start + 1)

    def listed(self, fh: int, index: int) -> tuple[bytes, int] | None:
        """The name of entry `index`, as an earlier life listed it, and the turn of that; None: not known."""
        for turn in (0, 1):
            at = self._listing_at(fh, turn)
            if at < 0:
                return None
            start, of, count, length = _LISTING.unpack_from(self._map, at)
            if of == fh and start and start - 1 <= index < start - 1 + count:
                blob = self._map[at + _LISTING.size : at + _LISTING.size + length]
                return blob.split(b"\0")[index - start + 1], turn
        return None

    @staticmethod
    def _listing_at(fh: int, turn: int) -> int:
        index = fh & MAX_HANDLES
        if index >= MAX_LISTINGS:
            return -1
        return _LISTINGS_AT + (2 * index + (turn & 1)) * _LISTING_BYTES

    # --- intents ------------------------------------------------------------------------------------

    def _read_intents(self) -> None:
        for index in reversed(range(MAX_INTENTS)):
            unique, kind, first, second = _INTENT.unpack_from(self._map, _INTENTS_AT + index * _INTENT.size)
            if not unique:
                self._intents.append(index)
                continue
            self._former.setdefault(unique, []).append((index, kind, first, second))
            if kind & 0xFF == CHANGE:
                self.reserved_slots.add(first)
        for notes in self._former.values():
            notes.sort(key=lambda note: note[3])

    def begin(self, unique: int) -> None:
        """A request has come; `asked_by` is set to the same."""
        self._under_way[unique] = []

    def end(self, unique: int) -> None:
        """It is answered."""
        for index in self._under_way.pop(unique, ()):
            _U64.pack_into(self._map, _INTENTS_AT + index * _INTENT.size, 0)
            self._intents.append(index)
        for index, *_ in self._former.pop(unique, ()):
            _U64.pack_into(self._map, _INTENTS_AT + index * _INTENT.size, 0)
            self._intents.append(index)
        for call in self._ends.pop(unique, ()):
            call()

    def note(self, kind: int, first: int, second: int) -> None:
        unique = asked_by.get()
        indices = self._under_way.get(unique)
        if indices is None or not self._intents:
            return
        index = self._intents.pop()
        at = _INTENTS_AT + index * _INTENT.size
        _INTENT.pack_into(self._map, at, 0, kind, first, second)
        _U64.pack_into(self._map, at, unique)
        indices.append(index)

    def former(self, kind: int) -> tuple[int, int] | None:
        unique = asked_by.get()
        notes = self._former.get(unique)
        if not notes or unique not in self._under_way:
            return None
        found = None
        for note in [one for one in notes if one[1] == kind]:
            notes.remove(note)
            self._under_way[unique].append(note[0])
            found = note[2], note[3]
        return found

    def was_begun(self, unique: int) -> bool:
        """An earlier life has noted something of this request that comes again."""
        return bool(self._former.get(unique))

    def at_end(self, call: Callable[[], None]) -> bool:
        unique = asked_by.get()
        if unique not in self._under_way:
            return False
        self._ends.setdefault(unique, []).append(call)
        return True

    def drop_former(self) -> None:
        """Whatever was to come again has come: notes of requests that ended without us are void."""
        for unique in [one for one in self._former if one not in self._under_way]:
            for index, *_ in self._former.pop(unique):
                _U64.pack_into(self._map, _INTENTS_AT + index * _INTENT.size, 0)
                self._intents.append(index)
