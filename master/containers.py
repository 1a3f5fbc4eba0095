"""Which inode a container id belongs to: meta b"c" + container -> ino.

Kept on disk in the same batch as the inode, because a worker reports containers and nothing here
may be sized by RAM. Both `InodeRecord.container` and, while the file is open for writing,
`base_container` are in the index.
"""

from __future__ import annotations

from alluxiofuse.master.records import InodeRecord
from alluxiofuse.master.store import Store, Transaction, u64

_PREFIX = b"c"


def new_container(store: Store) -> int:
    """An id that was never used. Not part of a transaction: it may stay unused."""
    return store.take_number(b"next_container")


def give_container(tx: Transaction, container: int, ino: int) -> None:
    """`container` is the inode's from now on; 0 is ignored."""
    if container:
        tx.put("meta", _PREFIX + u64(container), u64(ino))


def forget_container(tx: Transaction, container: int) -> None:
    """No inode has it any more; 0 is ignored."""
    if container:
        tx.delete("meta", _PREFIX + u64(container))


def inode_of_container(source: Store | Transaction, container: int) -> int | None:
    """The inode that has `container` (as content or base), None when nobody does."""
    value = source.get("meta", _PREFIX + u64(container))
    return None if value is None else int.from_bytes(value, "big")


def owner(source: Store | Transaction, container: int) -> int | None:
    """Like `inode_of_container`, but believed only when the inode itself confirms that it is its
    content, or, while it is open for writing, its base."""
    found = owner_record(source, container)
    return None if found is None else found[0]


def owner_record(source: Store | Transaction, container: int) -> tuple[int, InodeRecord] | None:
    """`owner`, with its record."""
    ino = inode_of_container(source, container)
    record = None if ino is None else source.inode(ino)
    if ino is None or record is None:
        return None
    is_base = record.home != 0 and record.base_container == container
    return (ino, record) if record.container == container or is_base else None
