"""A disk that gives back other bytes than were written: errors, never an answer that is cut short."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from alluxiofuse.errors import StateError
from alluxiofuse.master.store import Store, u64

COUNT = 20_000


def spoil_largest_table(directory: Path) -> None:
    """Flip bytes of its data, which comes first."""
    table = max(directory.glob("*.sst"), key=lambda file: file.stat().st_size)
    raw = bytearray(table.read_bytes())
    for at in range(len(raw) // 3, len(raw) // 3 + 50):
        raw[at] ^= 0xFF
    table.write_bytes(raw)


def test_a_scan_over_a_damaged_block_fails_and_does_not_end_early(tmp_path: Path) -> None:
    directory = tmp_path / "meta"
    store = Store(directory)
    tx = store.transaction()
    for number in range(COUNT):
        tx.put("edge", u64(1) + b"name%05d" % number, u64(number + 2))
    tx.commit()
    store._cf["edge"].flush()
    store.close()
    gc.collect()
    spoil_largest_table(directory)
    store = Store(directory)
    with pytest.raises(StateError, match="can't be read"):
        list(store.scan("edge", u64(1)))
    with pytest.raises(StateError, match="can't be read"):
        [store.child(1, b"name%05d" % number) for number in range(COUNT)]
    store.close()


def test_damage_is_not_taken_for_a_lock(tmp_path: Path) -> None:
    directory = tmp_path / "meta"
    store = Store(directory)
    tx = store.transaction()
    tx.put("edge", u64(1) + b"name", u64(2))
    tx.commit()
    store._cf["edge"].flush()
    store.close()
    gc.collect()
    for table in directory.glob("*.sst"):
        table.write_bytes(bytes(byte ^ 0xFF for byte in table.read_bytes()))
    with pytest.raises(StateError, match="can't be opened"):
        Store(directory)


def test_a_damaged_record_is_one_error(tmp_path: Path) -> None:
    store = Store(tmp_path / "meta")
    tx = store.transaction()
    tx.put("inode", u64(7), b"\x93garbage")
    tx.commit()
    with pytest.raises(StateError, match="inode 7 is damaged"):
        store.inode(7)
    with pytest.raises(StateError, match="inode 7 is damaged"):
        store.transaction().inode(7)
    store.close()


def test_a_store_that_is_only_read_changes_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "meta")
    tx = store.transaction()
    tx.put("meta", b"key", b"value")
    tx.commit()
    store.close()
    gc.collect()
    before = {
        file.name: file.read_bytes() for file in (tmp_path / "meta").iterdir() if file.name[:3] != "LOG"
    }
    store = Store(tmp_path / "meta", is_readonly=True)
    assert store.get("meta", b"key") == b"value"
    tx = store.transaction()
    tx.put("meta", b"key", b"other")
    with pytest.raises(StateError):
        tx.commit()
    store.close()
    after = {file.name: file.read_bytes() for file in (tmp_path / "meta").iterdir() if file.name[:3] != "LOG"}
    assert after == before
    with pytest.raises(StateError):
        Store(tmp_path / "nothing", is_readonly=True)
    assert not (tmp_path / "nothing").exists()
