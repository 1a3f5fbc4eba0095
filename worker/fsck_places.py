"""Which tier directories of a worker are there, for its check."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from alluxiofuse.errors import UserError
from alluxiofuse.findings import CantMend, Findings
from alluxiofuse.worker import layout
from alluxiofuse.worker.layout import Marker


@dataclass(frozen=True, slots=True)
class Place:
    """A tier directory that is there."""

    directory_id: int
    root: str
    quota_bytes: int
    """0: unknown."""


class Places:
    def __init__(
        self, uuid: str, known: dict[int, str], tiers: list[tuple[str, int]], findings: Findings
    ) -> None:
        """Of the worker `uuid` ("" when it does not know). `known`: directory id -> path, by its index;
        `tiers`: (directory, quota in bytes or 0) that the caller knows of besides. UserError: one of
        those is another worker's."""
        self.there: dict[int, Place] = {}
        self.absent: dict[int, str] = {}
        """Directory id -> path, of directories that are not there."""
        self._uuid = uuid
        self._findings = findings
        self._quotas = {os.path.abspath(path): quota for path, quota in tiers}
        ids = {path: number for number, path in known.items()}
        for path in (*ids, *(path for path in self._quotas if path not in ids)):
            self._find(path, ids.get(path, 0))

    def _find(self, path: str, known_id: int) -> None:
        quota = self._quotas.get(path, 0)
        try:
            marker = layout.read_marker(Path(path))
        except UserError as exc:
            if not known_id:
                raise
            self._marker_is_damaged(path, known_id, exc.message)
            if (Path(path) / "slabs").is_dir():
                self.there[known_id] = Place(known_id, path, quota)
            else:
                self.absent[known_id] = path
            return
        if marker is None:
            if known_id:
                self.absent[known_id] = path
            return
        if marker.worker_uuid != self._uuid and self._uuid:
            if known_id and path not in self._quotas:
                self.absent[known_id] = path  # its place was taken by another worker
                return
            raise UserError(f"{path} belongs to a worker with another state directory: name that one")
        self.there[marker.directory_id] = Place(marker.directory_id, path, quota)
        self.absent.pop(marker.directory_id, None)
        if known_id and marker.directory_id != known_id:
            self.absent.setdefault(known_id, path)

    def _marker_is_damaged(self, path: str, directory_id: int, reason: str) -> None:
        def change() -> None:
            if not (Path(path) / "slabs").is_dir():
                raise CantMend(f"{path} holds no slabs: is its disk mounted?")
            fd = os.open(f"{path}/{layout.MARKER}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                layout.write_marker(fd, Marker(self._uuid, directory_id))
            finally:
                os.close(fd)

        self._findings.problem("marker-damaged", reason.partition(":")[0] + ": made again", change)
