"""What a kind of damage is, and how states on disk are changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
from daemons import LocalDaemon
from fsck_world import find, index_of, record_of, store_of

from alluxiofuse.master.store import Store, Transaction
from alluxiofuse.worker.index import Batch


@dataclass
class Damage:
    name: str
    do: Callable[[LocalDaemon], None]
    codes: set[str]
    """Kinds of findings that tell of it."""
    changes: dict[str, bytes | str | None] = field(default_factory=dict)
    """What is not as before after the repair; None: not there, and read again from the under storage."""
    left: set[str] = field(default_factory=set)
    """Kinds that no repair can undo."""
    arguments: tuple[str, ...] = ()
    named: str = ""
    """Text that a finding has to have."""


DAMAGES: list[Damage] = []


def damage(
    *codes: str,
    changes: dict[str, bytes | str | None] | None = None,
    left: tuple[str, ...] = (),
    arguments: tuple[str, ...] = (),
    named: str = "",
) -> Callable[[Callable[[LocalDaemon], None]], Callable[[LocalDaemon], None]]:
    def enter(do: Callable[[LocalDaemon], None]) -> Callable[[LocalDaemon], None]:
        DAMAGES.append(Damage(do.__name__, do, set(codes), changes or {}, set(left), arguments, named))
        return do

    return enter


def change(site: LocalDaemon, do: Callable[[Store, Transaction], None]) -> None:
    with store_of(site) as store:
        tx = store.transaction()
        do(store, tx)
        tx.commit()


def set_record(site: LocalDaemon, path: str, **fields: int) -> None:
    """Change fields of an inode's record."""

    def edit(store: Store, tx: Transaction) -> None:
        ino = find(store, path)
        record = tx.inode(ino)
        assert record is not None
        tx.put_inode(ino, msgspec.structs.replace(record, **fields))

    change(site, edit)


def change_index(site: LocalDaemon, do: Callable[[Batch], None]) -> None:
    with index_of(site) as index:
        batch = index.batch()
        do(batch)
        index.commit(batch)


def set_slab(site: LocalDaemon, path: str, **fields: int) -> None:
    """Change fields of the index's record of a file's slab."""
    container = container_of(site, path)
    with index_of(site) as index:
        record = index.record(container)
        assert record is not None
        index.put(container, msgspec.structs.replace(record, **fields))


def container_of(site: LocalDaemon, path: str) -> int:
    with store_of(site) as store:
        return record_of(store, path).container
