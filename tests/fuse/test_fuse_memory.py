"""What one daemon leaves to the next, without a mount."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Iterator

import pytest
import trio

from alluxiofuse.client.intents import APPEND, CHANGE, asked_by
from alluxiofuse.errors import UserError
from alluxiofuse.fuse.handles import DirHandle
from alluxiofuse.fuse.memory import IS_DIRECTORY, MAX_HANDLES, HandleRecord, Memory, make
from alluxiofuse.wire.types import Attr, DirEntry


@pytest.fixture
def fd() -> Iterator[int]:
    fd = make()
    yield fd
    os.close(fd)
    asked_by.set(0)


def test_handles_are_those_that_were_not_removed(fd: int) -> None:
    first = Memory(fd)
    handles = [
        first.add_handle(HandleRecord(ino, os.O_RDWR, ino & 15, -ino, 5, 6, 7)) for ino in range(1, 50)
    ]
    for fh in handles[::2]:
        first.remove_handle(fh)
    second = Memory(fd)
    assert [one.fh for one in second.former_handles] == handles[1::2]
    assert [one.record for one in second.former_handles] == [
        HandleRecord(ino, os.O_RDWR, ino & 15, -ino, 5, 6, 7) for ino in range(2, 50, 2)
    ]
    assert (first.life, second.life) == (1, 2)


def test_numbers_are_not_used_twice(fd: int) -> None:
    seen: set[int] = set()
    for _ in range(5):
        memory = Memory(fd)
        for _ in range(10):
            fh = memory.add_handle(HandleRecord(1))
            assert fh not in seen
            assert 0 < fh < 1 << 64
            seen.add(fh)
            memory.remove_handle(fh)


def test_the_predecessor(fd: int) -> None:
    first = Memory(fd)
    assert first.predecessor is None
    first.remember_session(12, 34)
    for ino in (7, 7, 8):
        first.add_handle(HandleRecord(ino))
    first.add_handle(HandleRecord(9, bits=IS_DIRECTORY))
    before = Memory(fd).predecessor
    assert before is not None
    assert (before.session_id, before.event_seq, before.open_inos) == (12, 34, [7, 7, 8])


def test_a_handle_of_a_request_that_comes_again(fd: int) -> None:
    first = Memory(fd)
    asked_by.set(5)
    fh = first.add_handle(HandleRecord(1))
    second = Memory(fd)
    assert second.unanswered_handle(6) == 0
    assert second.unanswered_handle(5) == fh
    assert second.unanswered_handle(5) == 0


def test_notes_live_until_the_answer(fd: int) -> None:
    first = Memory(fd)
    for unique in (1, 2):
        asked_by.set(unique)
        first.begin(unique)
        first.note(CHANGE | 9 << 8, 4 + unique, 5)
        first.note(APPEND, 6, 7)
    first.end(1)
    for _ in range(2):  # Also over a life in which it did not come again.
        memory = Memory(fd)
        assert memory.reserved_slots == {6}
    asked_by.set(1)
    memory.begin(1)
    assert memory.former(APPEND) is None
    asked_by.set(2)
    memory.begin(2)
    assert memory.was_begun(2)
    assert memory.former(CHANGE) is None
    assert memory.former(CHANGE | 9 << 8) == (6, 5)
    assert memory.former(CHANGE | 9 << 8) is None
    assert memory.former(APPEND) == (6, 7)
    memory.end(2)
    assert Memory(fd).reserved_slots == set()


def test_notes_of_nobody_are_none(fd: int) -> None:
    memory = Memory(fd)
    memory.note(APPEND, 1, 2)
    assert not memory.at_end(lambda: None)
    asked_by.set(3)
    memory.note(APPEND, 1, 2)  # Its request is over already.
    memory.begin(3)
    calls = []
    assert memory.at_end(lambda: calls.append(1))
    memory.end(3)
    assert calls == [1]
    memory = Memory(fd)
    memory.begin(3)
    assert memory.former(APPEND) is None


def test_what_did_not_come_again_is_dropped(fd: int) -> None:
    first = Memory(fd)
    asked_by.set(3)
    first.begin(3)
    first.note(APPEND, 1, 2)
    second = Memory(fd)
    second.drop_former()
    assert not Memory(fd).was_begun(3)


def test_names_of_the_last_two_replies(fd: int) -> None:
    first = Memory(fd)
    fh = first.add_handle(HandleRecord(1, bits=IS_DIRECTORY))
    for turn in range(1, 5):
        first.note_listing(fh, turn, 10 * turn, [b"%d-%d" % (turn, number) for number in range(10)])
    second = Memory(fd)
    assert second.listed(fh, 29) is None
    assert second.listed(fh, 30) == (b"3-0", 1)
    assert second.listed(fh, 49) == (b"4-9", 0)
    assert second.listed(fh, 50) is None
    second.remove_handle(fh)
    other = second.add_handle(HandleRecord(2, bits=IS_DIRECTORY))
    assert other & MAX_HANDLES == fh & MAX_HANDLES
    assert second.listed(other, 30) is None


def test_another_format_is_refused(fd: int) -> None:
    os.pwrite(fd, b"\xff", 8)
    with pytest.raises(UserError, match="another version"):
        Memory(fd)


def test_it_costs_next_to_nothing(fd: int) -> None:
    """A few microseconds for an open and a close, or for a change; memory for what is used only."""
    memory = Memory(fd)
    started, count = time.process_time(), 2000
    for unique in range(1, count + 1):
        asked_by.set(unique)
        memory.begin(unique)
        fh = memory.add_handle(HandleRecord(1))
        memory.note(CHANGE, 1, 2)
        memory.remove_handle(fh)
        memory.end(unique)
    cost_us = (time.process_time() - started) / count * 1e6
    print(f"{cost_us:.1f} us")
    assert cost_us < 50
    assert os.fstat(fd).st_blocks * 512 < 1 << 20


def test_a_listing_goes_on_behind_a_name() -> None:
    """Whatever was added or removed before it; further back it goes by count."""
    names = [b"%03d" % number for number in range(100)]

    async def list_from(after: bytes) -> AsyncIterator[list[DirEntry]]:
        left = [name for name in sorted(names) if name > after]
        for start in range(0, len(left), 7):
            yield [DirEntry(name, attr) for name in left[start : start + 7]]

    async def name_at(handle: DirHandle, index: int) -> bytes:
        page = await handle.page_at(index, lambda: 0)
        return b"" if page is None else page.entries[index - page.start].name

    async def test() -> None:
        handle = DirHandle(1, list_from)
        assert not handle.is_started
        handle.go_on(49, b"049")
        assert handle.is_started
        del names[:10]
        names.extend([b"000a", b"049a"])
        assert await name_at(handle, 50) == b"049a"
        assert [await name_at(handle, index) for index in range(51, 101)] == names[40:90]
        assert await name_at(handle, 101) == b""
        assert await name_at(handle, 60) == b"059"  # Read anew, from a name that is known.
        assert await name_at(handle, 3) == b"012"
        await handle.close()

    attr = Attr(1, 0o100644, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0.0)
    trio.run(test)
