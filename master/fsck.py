"""The check of a metadata store: in which order its parts run. `fsck_check` says what they share."""

from __future__ import annotations

from collections.abc import Callable

from alluxiofuse.findings import Finding, Findings, Level
from alluxiofuse.master.fsck_check import Check, Mounts
from alluxiofuse.master.fsck_index import (
    check_containers,
    check_lists,
    check_meta,
    check_replies,
    check_xattrs,
)
from alluxiofuse.master.fsck_persist import check_persist
from alluxiofuse.master.fsck_tree import TreePass
from alluxiofuse.master.store import Store


def check_store(check: Check, advance: Callable[[int], None] = lambda count: None) -> None:
    """One run over everything. `advance` is called for every key of the families that are passed over:
    about `work_of` times 1 in all. StateError: the disk does not give back what was written."""
    check_meta(check)
    for step in (check_containers(check), TreePass(check).run(), check_persist(check)):
        for _ in step:
            advance(1)
    check_lists(check)
    check_replies(check)
    check_xattrs(check)


def work_of(store: Store) -> int:
    """About how often `check_store` calls `advance`."""
    return 2 * store.estimate("inode") + store.estimate("meta")


def problems(store: Store, mounts: Mounts | None = None) -> list[str]:
    """One sentence for each broken invariant; [] when all is well. For tests, and a person who doubts
    an open store. `mounts` None: those of the store."""
    found: list[str] = []

    def tell(finding: Finding) -> None:
        if finding.level is not Level.NOTE:
            found.append(finding.text)

    check_store(Check(store, Findings(tell=tell), mounts))
    return found
