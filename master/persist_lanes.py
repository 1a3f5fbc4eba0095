"""How much of the persist log is under way for each mount, and which mounts rest because their under
storage does not answer. Plain state of the persister, no clock of its own.

A store that is slow, silent or gone holds up only its own mount. After a few failures in a row that
no success interrupts, its mount rests: nothing is sent there but, after each rest, one entry to see
whether it is back; rests grow to `MAX_REST_S`. The entries wait in `ReadyQueue`, not in a thread.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

RESTS_AFTER = 3
"""Failures in a row."""
FIRST_REST_S = 0.5
MAX_REST_S = 15.0
"""A store that is back is noticed within this and half as much again."""


@dataclass(slots=True)
class Lane:
    """Of one mount."""

    job_count: int = 0
    upload_count: int = 0
    failed_count: int = 0
    """In a row."""
    rest_until_s: float = 0.0
    is_probing: bool = False
    message: str = ""
    """Why the last one failed."""


class Lanes:
    def __init__(self, jobs_at_once: int, uploads_at_once: int) -> None:
        """Of one mount, each."""
        self._jobs_at_once = jobs_at_once
        self._uploads_at_once = uploads_at_once
        self._lanes: dict[int, Lane] = {}
        self.rest_count = 0

    def _lane(self, mount_id: int) -> Lane:
        return self._lanes.setdefault(mount_id, Lane())

    def is_open(self, mount_id: int, now: float) -> bool:
        """One more job (or upload, see `takes_upload`) may start."""
        lane = self._lane(mount_id)
        if lane.job_count >= self._jobs_at_once or lane.is_probing:
            return False
        return now >= lane.rest_until_s

    def takes_upload(self, mount_id: int) -> bool:
        return self._lane(mount_id).upload_count < self._uploads_at_once

    def room(self, mount_id: int, now: float) -> int:
        """How many jobs may start."""
        lane = self._lane(mount_id)
        if not self.is_open(mount_id, now):
            return 0
        return 1 if lane.failed_count >= RESTS_AFTER else self._jobs_at_once - lane.job_count

    def upload_room(self, mount_id: int, now: float) -> int:
        """How many uploads may start."""
        free = self._uploads_at_once - self._lane(mount_id).upload_count
        return max(0, min(self.room(mount_id, now), free))

    def started(self, mount_id: int, *, is_upload: bool) -> None:
        lane = self._lane(mount_id)
        lane.is_probing = lane.failed_count >= RESTS_AFTER
        if is_upload:
            lane.upload_count += 1
        else:
            lane.job_count += 1

    def ended(self, mount_id: int, *, is_upload: bool) -> None:
        """After `answered` or `failed`, if it is known that it was one of them."""
        lane = self._lane(mount_id)
        lane.is_probing = False
        if is_upload:
            lane.upload_count -= 1
        else:
            lane.job_count -= 1

    def is_busy(self) -> bool:
        return any(lane.job_count or lane.upload_count for lane in self._lanes.values())

    def answered(self, mount_id: int) -> None:
        """The store did, or refused, what was asked: it is there."""
        lane = self._lane(mount_id)
        lane.failed_count, lane.rest_until_s, lane.message = 0, 0.0, ""

    def failed(self, mount_id: int, message: str, now: float) -> None:
        """It did not answer."""
        lane = self._lane(mount_id)
        lane.message = message
        if now < lane.rest_until_s:
            return  # begun before the rest
        lane.failed_count += 1
        if lane.failed_count >= RESTS_AFTER:
            self.rest_count += 1
            rest_s = min(MAX_REST_S, FIRST_REST_S * 2 ** min(10, lane.failed_count - RESTS_AFTER))
            lane.rest_until_s = now + rest_s * random.uniform(0.5, 1.5)  # noqa: S311

    def is_resting(self, mount_id: int) -> bool:
        return self._lane(mount_id).failed_count >= RESTS_AFTER

    def why_resting(self, mount_id: int) -> str:
        """ "": it does not."""
        return self._lane(mount_id).message if self.is_resting(mount_id) else ""

    def resting(self) -> list[tuple[int, str]]:
        """(mount id, why) of those that wait for their store."""
        return [
            (mount_id, lane.message) for mount_id, lane in self._lanes.items() if self.is_resting(mount_id)
        ]

    def next_due_s(self, now: float) -> float | None:
        """When the next rest ends; None: nobody rests."""
        ends = [lane.rest_until_s for lane in self._lanes.values() if lane.rest_until_s > now]
        return min(ends, default=None)
