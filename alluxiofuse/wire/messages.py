"""What every operation on the wire is made of: the request base class and bounded field types.

A request is a struct named after its op; its fields are the arguments, `Request[R]` names the
result type. `OP` is the method name on the wire ("master.lookup"). The ops of the master are in
`master_ops.py`, those of a worker in `worker_ops.py`; both sides use the same declarations and
the handler table is checked against them at start-up (`rpc.service`).

Adding a field: at the end, with a default, so that older peers still understand each other.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any, ClassVar, ForwardRef, Generic, TypeVar, get_args

import msgspec
from msgspec import Meta

from alluxiofuse.ids import MAX_FILE_BYTES, MAX_NAME_BYTES, MAX_PATH_BYTES, MAX_SYMLINK_BYTES

R = TypeVar("R")

U32 = Annotated[int, Meta(ge=0, le=0xFFFF_FFFF)]
U63 = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Ino = Annotated[int, Meta(ge=1, le=(1 << 63) - 1)]
Id = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Size = Annotated[int, Meta(ge=0, le=MAX_FILE_BYTES)]
Ns = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
"""Nanoseconds since 1970; negative before."""
Name = Annotated[bytes, Meta(min_length=1, max_length=4096)]
"""One path component. Longer than MAX_NAME_BYTES passes here so that it becomes ENAMETOOLONG."""
Path = Annotated[bytes, Meta(max_length=MAX_PATH_BYTES)]
SymlinkTarget = Annotated[bytes, Meta(min_length=1, max_length=MAX_SYMLINK_BYTES)]
XattrName = Annotated[bytes, Meta(min_length=1, max_length=255)]
XattrValue = Annotated[bytes, Meta(max_length=64 << 10)]
Text = Annotated[str, Meta(max_length=4096)]

assert MAX_NAME_BYTES <= 4096


class Message(msgspec.Struct, array_like=True, gc=False):
    """A value inside requests and results."""


class Request(msgspec.Struct, Generic[R], array_like=True, gc=False):
    """Arguments of one op, whose result is an `R`."""

    OP: ClassVar[str]
    DEADLINE_S: ClassVar[float] = 600.0
    """Without an answer for this long the caller gives up, however alive the other end is. Long, as an
    answer may wait for a first listing of a large directory."""


class Change(Request[R]):
    """A request of a session (`session_id`) that changes something. Its last field is `request_id`: 0, or
    what makes repeating it harmless. The client has numbered slots and uses one for one request at a
    time, each with a larger number than the one before; the master keeps, in the batch of the change
    itself, the newest number of each slot with its answer. A request that comes again gets that answer."""


SLOT_BITS = 12
MAX_SLOTS = 1 << SLOT_BITS
"""Changes of one session that may be under way at one time."""


def request_id(slot: int, number: int) -> int:
    """`number` from 1."""
    return number << SLOT_BITS | slot


def slot_and_number(request_id: int) -> tuple[int, int]:
    return request_id & MAX_SLOTS - 1, request_id >> SLOT_BITS


class Nothing(Message):
    """The result of ops that return nothing."""


NOTHING = Nothing()


def result_type(request: type[Request[Any]]) -> Any:
    """The `R` of a request class, resolved when it was written as a string."""
    for base in getattr(request, "__orig_bases__", ()):
        for arg in get_args(base):
            if isinstance(arg, ForwardRef):
                return getattr(sys.modules[request.__module__], arg.__forward_arg__)
            return arg
    raise TypeError(f"{request.__name__} does not name its result type")


def requests_of(module: object) -> dict[str, type[Request[Any]]]:
    """OP -> request class, of all requests that a module declares."""
    found: dict[str, type[Request[Any]]] = {}
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, Request) and "OP" in vars(value):
            assert value.OP not in found, f"{value.OP} is declared twice"
            found[value.OP] = value
    return found
