"""Removals that are done together, as a store deletes many objects in one request."""

from __future__ import annotations

from alluxiofuse.master.persist_failures import Failures
from alluxiofuse.master.persist_plan import Job, Kind, Planner
from alluxiofuse.master.store import Store, u64

REMOVALS_PER_JOB = 500


def more_removals(
    store: Store, planner: Planner, failures: Failures, first: Job, now_ns: int, rested_ns: int
) -> list[Job]:
    """Those of the same kind that follow in the store, have rested `rested_ns`, and can be done with
    `first`."""
    found: list[Job] = []
    looked = 0
    tx = store.transaction()
    for path, _ in store.scan("persist", b"r" + u64(first.mount_id), first.target):
        looked += 1
        if len(found) >= REMOVALS_PER_JOB or looked > 2 * REMOVALS_PER_JOB:
            break
        entry = tx.remove_entry(first.mount_id, path)
        key = (first.mount_id, path)
        if entry is None or entry.is_dir != first.is_dir or key in failures:
            continue
        if now_ns - rested_ns < entry.queued_at_ns <= now_ns:
            continue
        plan = planner.plan(key)
        if isinstance(plan, Job) and plan.kind is Kind.REMOVE:
            found.append(plan)
    return found
