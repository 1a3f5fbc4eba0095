"""What may be seen after a fault: an oracle that remembers what was acknowledged.

A `World` is a directory tree that one actor alone changes, as its acknowledged operations made it.
The rules, for anything that kills processes (the page cache survives):

* A name, mode, target, extended attribute or truncation whose operation returned is there.
* A file's content is a chain of versions: the first was made durable (by fsync or close), each
  further one added a write. Until the next fsync or close that returns, every range of 4 KiB may be that of
  any version in the chain, but never anything else; zeros only where a version has a hole.
* An operation that was under way (its error says only that nobody knows) was done or was not: the
  whole tree is that of one `World` or that of the other.

No I/O here. `Op` is what actors do, `World.apply` what it means, `World.differences` the judgement.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Iterator
from dataclasses import dataclass, field, fields
from itertools import pairwise

from stamps import describe, stamped

GRAIN_BYTES = 4096
"""A killed process stops a write between pages of the kernel's page cache, nowhere else."""

FILE, DIRECTORY, SYMLINK = "file", "directory", "symlink"


@dataclass(frozen=True, slots=True)
class Op:
    """One system call. Paths are relative to the actor's directory; unused fields stay as they are."""

    name: str
    path: str = ""
    other: str = ""
    """New name of a rename or link, target of a symlink, name of an extended attribute."""
    handle: int = 0
    """Number of an open file, chosen by who opens it."""
    offset: int = 0
    length: int = 0
    """Bytes of a write; new size of a truncation."""
    mode: int = 0
    value: bytes = b""
    is_append: bool = False
    is_truncating: bool = False
    file_id: int = 0
    version: int = 0
    """With `file_id` the stamp of what a write writes."""
    mtime_ns: int = 0

    def __str__(self) -> str:
        given = [(one.name, getattr(self, one.name)) for one in fields(self) if one.name != "name"]
        return f"{self.name} " + " ".join(f"{name}={str(value)[:80]}" for name, value in given if value)


@dataclass(eq=False, slots=True)
class Node:
    """An inode."""

    kind: str
    mode: int
    file_id: int
    target: str = ""
    xattrs: dict[str, bytes] = field(default_factory=dict)
    versions: list[bytes] = field(default_factory=lambda: [b""])
    """Of a file: what its content may be. The first is durable, the last is the newest."""
    mtime_ns: int | None = None
    """As last set by utime; None: anything."""
    is_unsettled: bool = False
    """Who was writing to it is gone: until someone else has ended that, its content may still go
    on along the chain. Actors leave it alone."""
    write_count: int = 0


@dataclass(eq=False, slots=True)
class Handle:
    node: Node
    is_append: bool


@dataclass(frozen=True, slots=True)
class Found:
    """What a scan found at one path."""

    kind: str
    mode: int
    nlink: int
    ino: int
    size: int
    mtime_ns: int
    target: str = ""
    xattrs: dict[str, bytes] = field(default_factory=dict)
    data: bytes = b""
    error: str = ""
    """Why it could not be read."""


def parent_of(path: str) -> str:
    return path.rpartition("/")[0]


def truncated(data: bytes, size: int) -> bytes:
    return data[:size] + bytes(max(0, size - len(data)))


def written(data: bytes, offset: int, new: bytes) -> bytes:
    return truncated(data, max(offset, len(data)))[:offset] + new + data[offset + len(new) :]


class World:
    def __init__(self, number: int) -> None:
        """`number` makes the stamps of this world's files its own."""
        self.names: dict[str, Node] = {}
        """Everything below the actor's directory, by relative path."""
        self.handles: dict[int, Handle] = {}
        self._next_id = number << 20

    def copy(self) -> World:
        return copy.deepcopy(self)

    # --- looking ----------------------------------------------------------------------------------

    def paths(self, kind: str) -> list[str]:
        return sorted(path for path, node in self.names.items() if node.kind == kind)

    def below(self, path: str) -> list[str]:
        return [name for name in self.names if name.startswith(f"{path}/")]

    def nodes(self) -> Iterator[Node]:
        """Each once: named ones and those that are only open."""
        seen = {id(node): node for node in self.names.values()}
        seen.update({id(handle.node): handle.node for handle in self.handles.values()})
        return iter(list(seen.values()))

    def is_open(self, node: Node) -> bool:
        return any(handle.node is node for handle in self.handles.values())

    def is_nameless(self, handle: int) -> bool:
        """An open file that was removed, or replaced."""
        found = self.handles.get(handle)
        return found is not None and not any(node is found.node for node in self.names.values())

    def outcomes(self, op: Op) -> list[World]:
        """What may be after an operation that nobody knows of, the likeliest first. No file is open by
        it; one that it was to close is not open any more."""
        after = self.copy()
        after.apply(op, is_certain=False)
        if op.name in ("open", "create"):
            del after.handles[op.handle]
        if op.name in ("write", "truncate", "ftruncate", "open", "close", "fsync"):
            return [after]  # Its chains hold what was before, too.
        return [self, after]

    # --- changing ---------------------------------------------------------------------------------

    def apply(self, op: Op, *, is_certain: bool = True) -> None:
        """The operation returned success; not certain: it may have been done before its process was
        killed, so what it would have made durable is not."""
        match op.name:
            case "create":
                node = self.names[op.path] = self._new(FILE, op.mode)
                self._open(op, node)
            case "open":
                node = self.names[op.path]
                if op.is_truncating:
                    self._truncate(node, 0, is_certain)
                self._open(op, node)
            case "mkdir":
                self.names[op.path] = self._new(DIRECTORY, op.mode)
            case "symlink":
                node = self.names[op.path] = self._new(SYMLINK, 0o777)
                node.target = op.other
            case "link":
                self.names[op.other] = self.names[op.path]
            case "unlink" | "rmdir":
                del self.names[op.path]
            case "rename":
                self._rename(op.path, op.other)
            case "chmod":
                self.names[op.path].mode = op.mode
            case "setxattr":
                self.names[op.path].xattrs[op.other] = op.value
            case "removexattr":
                del self.names[op.path].xattrs[op.other]
            case "utime":
                self.names[op.path].mtime_ns = op.mtime_ns
            case "truncate":
                self._truncate(self.names[op.path], op.length, is_certain)
            case "ftruncate":
                self._truncate(self.handles[op.handle].node, op.length, is_certain)
            case "write":
                node = self.handles[op.handle].node
                data = stamped(op.file_id, op.version, op.offset, op.length)
                node.versions.append(written(node.versions[-1], op.offset, data))
                node.mtime_ns = None
            case "fsync":
                if is_certain:
                    self._settle(self.handles[op.handle].node)
            case "close":
                node = self.handles.pop(op.handle).node
                if is_certain:
                    self._settle(node)
            case "read":
                pass
            case _:
                raise ValueError(op.name)

    def _new(self, kind: str, mode: int) -> Node:
        self._next_id += 1
        return Node(kind, mode, self._next_id)

    def _open(self, op: Op, node: Node) -> None:
        self.handles[op.handle] = Handle(node, op.is_append)

    def _rename(self, old: str, new: str) -> None:
        if self.names.get(new) is self.names[old]:
            return  # rename(2): two names of one file both stay.
        moved = {old: new} | {path: new + path[len(old) :] for path in self.below(old)}
        nodes = {moved[path]: self.names.pop(path) for path in moved}
        self.names.update(nodes)

    @staticmethod
    def _truncate(node: Node, size: int, is_certain: bool) -> None:
        """Metadata: done when it returns, whatever becomes of writes before it."""
        after = [truncated(data, size) for data in node.versions]
        node.versions = after if is_certain else [*node.versions, *after]
        node.mtime_ns = None

    @staticmethod
    def _settle(node: Node) -> None:
        node.versions = node.versions[-1:]

    def lose_handles(self) -> None:
        """The FUSE mount is gone, and every open file with it."""
        for handle in self.handles.values():
            handle.node.is_unsettled = True
        self.handles.clear()

    def accept(self, found: dict[str, Found], *, settled: Container[str] = ()) -> None:
        """What was found (and has no differences) is what it is from now on; of unsettled files only of
        those that `settled` names."""
        for path, node in self.names.items():
            if node.kind == FILE and (path in settled or not node.is_unsettled):
                node.versions = [found[path].data]
                node.is_unsettled = False

    # --- judging ----------------------------------------------------------------------------------

    def differences(self, found: dict[str, Found]) -> list[str]:
        """What a scan shows that may not be; empty: all is well."""
        wrong = [f"{path}: lost" for path in self.names if path not in found]
        wrong += [f"{path}: should not be there ({one.kind})" for path, one in found.items()
                  if path not in self.names]  # fmt: skip
        for path in sorted(self.names.keys() & found.keys()):
            wrong += [f"{path}: {text}" for text in self._differences(self.names[path], found[path])]
        both = self.names.keys() & found.keys()
        nodes = {(found[path].ino, id(self.names[path])) for path in both}
        if len({ino for ino, _ in nodes}) != len(nodes):
            wrong.append("files that are not links of each other have the same inode number")
        if len({node for _, node in nodes}) != len(nodes):
            wrong.append("links of one file have different inode numbers")
        return wrong

    def _differences(self, node: Node, found: Found) -> Iterator[str]:
        if found.error:
            yield found.error
            return
        if found.kind != node.kind:
            yield f"is a {found.kind}, not a {node.kind}"
            return
        if node.kind != SYMLINK and found.mode != node.mode:
            yield f"mode {found.mode:o}, not {node.mode:o}"
        if found.target != node.target:
            yield f"target {found.target!r}, not {node.target!r}"
        if found.xattrs != node.xattrs:
            yield f"extended attributes {found.xattrs}, not {node.xattrs}"
        if node.kind == DIRECTORY:
            return
        links = sum(other is node for other in self.names.values())
        if found.nlink != links:
            yield f"{found.nlink} links, not {links}"
        if node.kind == FILE:
            if node.mtime_ns is not None and found.mtime_ns != node.mtime_ns:
                yield f"mtime {found.mtime_ns}, not {node.mtime_ns}"
            if found.size != len(found.data) and not node.is_unsettled:
                yield f"stat says {found.size} bytes, {len(found.data)} can be read"
            yield from content_differences(node.versions, found.data)


def content_differences(versions: list[bytes], data: bytes) -> list[str]:
    """What of `data` no version explains. `versions` is never empty."""
    if data == versions[-1]:
        return []
    wrong = []
    if not _is_size_explained(versions, len(data)):
        wrong.append(f"size {len(data)}, not {sorted({len(one) for one in versions})}")
    views = [memoryview(one) for one in versions]
    found = memoryview(data)
    for start in range(0, len(data), GRAIN_BYTES):
        end = min(start + GRAIN_BYTES, len(data))
        if not any(len(view) >= end and view[start:end] == found[start:end] for view in views):
            place = _first_wrong(versions[-1], data, start, end)
            wanted = describe(versions[-1][place : place + 128], place)
            wrong.append(
                f"at {place}: {describe(data[place : start + GRAIN_BYTES], place)}; newest is {wanted}, "
                f"durable is {describe(versions[0][place : place + 128], place)}"
            )
            if len(wrong) > 5:
                return [*wrong, "..."]
    return wrong


def _is_size_explained(versions: list[bytes], size: int) -> bool:
    sizes = [len(one) for one in versions]
    if size in sizes:
        return True
    # A write that grew the file and was stopped in the middle.
    return size % GRAIN_BYTES == 0 and any(before < size < after for before, after in pairwise(sizes))


def _first_wrong(newest: bytes, data: bytes, start: int, end: int) -> int:
    for place in range(start, end):
        if newest[place : place + 1] != data[place : place + 1]:
            return place
    return start
