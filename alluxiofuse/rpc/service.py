"""From a request on arrival to what goes back: the table of handlers, shared by all transports."""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import msgspec

from alluxiofuse import descriptors
from alluxiofuse.errors import AlluxioFuseError, BadRequestError, FsError
from alluxiofuse.rpc.base import Answer, Buffer, FileRange, Handler, Peer, Service
from alluxiofuse.rpc.ratelimit import LimitedLog
from alluxiofuse.wire import codec
from alluxiofuse.wire.framing import MAX_FDS, MAX_PAYLOAD_BYTES
from alluxiofuse.wire.messages import Request

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Op:
    name: str
    decoder: codec.Decoder[Any]
    handler: Handler


class HandlerTable:
    """All ops of a service with their handlers. Constant after construction, but for the counter."""

    def __init__(self, service: Service) -> None:
        """TypeError when the handlers are not exactly those of the declared ops."""
        ops, handlers = service.ops, service.handlers
        missing = sorted(op for op, request in ops.items() if request not in handlers)
        declared = set(ops.values())
        foreign = sorted(request.__name__ for request in handlers if request not in declared)
        if missing or foreign:
            raise TypeError(
                f"{type(service).__name__}: ops without a handler: {missing or 'none'}, "
                f"handlers of undeclared ops: {foreign or 'none'}"
            )
        self._ops = {
            name: Op(name, codec.decoder(request), handlers[request]) for name, request in ops.items()
        }
        self._by_request = {request: self._ops[name] for name, request in ops.items()}
        self.role = _role(ops)
        """What a client must expect at this address: the part of the op names before the dot."""
        self.bug_count = 0
        """Exceptions of handlers that were no AlluxioFuseError."""
        self._limited = LimitedLog(_log)

    def run(self, peer: Peer, method: str, arguments: codec.Raw, payload: Buffer) -> Any:
        """Decode and call: a result, an Answer, or an awaitable of one. Raises what the handler
        raises, BadRequestError for an unknown method or arguments that do not fit."""
        op = self._ops.get(method)
        if op is None:
            raise BadRequestError("unknown method")
        try:
            request = op.decoder.decode(arguments)
        except (msgspec.MsgspecError, ValueError, RecursionError) as exc:
            raise BadRequestError(f"{op.name}: {exc}") from None
        return op.handler(peer, request, payload)

    def run_decoded(self, peer: Peer, request: Request[Any], payload: Buffer) -> Any:
        """The same for a request that did not travel."""
        op = self._by_request.get(type(request))
        if op is None:
            raise BadRequestError("unknown method")
        return op.handler(peer, request, payload)

    def error_of(self, exc: Exception, method: str) -> AlluxioFuseError:
        """What to answer when a handler raised `exc`; a bug is logged and counted here."""
        cause = _only_leaf(exc)
        if isinstance(cause, AlluxioFuseError):
            return cause
        if isinstance(cause, OSError) and cause.errno in descriptors.EXHAUSTED:
            self._limited.warning("%s: %s", method, cause.strerror)
            return FsError(cause.errno, "the daemon has too many open files")
        self.bug_count += 1
        self._limited.exception("%s failed: a bug in its handler", method, exc=exc)
        return AlluxioFuseError(f"{method} failed inside the daemon: see its log")


def is_awaitable(result: object) -> bool:
    return hasattr(type(result), "__await__")


def as_awaitable(result: object) -> Awaitable[Any]:
    return cast(Awaitable[Any], result)


def as_answer(result: Any) -> Answer[Any]:
    """What a handler returned, as an Answer within the limits; TypeError or ValueError are bugs."""
    if not isinstance(result, Answer):
        return Answer(result)
    if len(result.fds) > MAX_FDS:
        raise ValueError(f"{len(result.fds)} descriptors in one answer")
    if payload_length(result.payload) > MAX_PAYLOAD_BYTES:
        raise ValueError(f"payload of {payload_length(result.payload)} bytes")
    return result


def duplicates(fds: Sequence[int]) -> list[int]:
    """Of the descriptors of an answer; none at all when this process has too many: whoever asked can
    do without, as over TCP."""
    made: list[int] = []
    try:
        for fd in fds:
            made.append(os.dup(fd))
    except OSError as exc:
        for fd in made:
            os.close(fd)
        if exc.errno not in descriptors.EXHAUSTED:
            raise
        return []
    return made


def payload_length(payload: Buffer | FileRange) -> int:
    """In bytes."""
    if isinstance(payload, FileRange):
        return payload.length
    return payload.nbytes if isinstance(payload, memoryview) else len(payload)


def release(payload: Buffer | FileRange) -> None:
    """Tell the owner of a FileRange that it is no longer needed. Call once for each."""
    if isinstance(payload, FileRange) and payload.on_sent is not None:
        try:
            payload.on_sent()
        except Exception:
            _log.exception("on_sent failed: a bug")


def _only_leaf(exc: BaseException) -> BaseException:
    """A handler with a nursery raises groups: of one error, that error is meant."""
    while isinstance(exc, BaseExceptionGroup) and len(exc.exceptions) == 1:
        exc = exc.exceptions[0]
    return exc


def _role(ops: dict[str, type[Request[Any]]]) -> str:
    roles = {name.partition(".")[0] for name in ops}
    if len(roles) != 1:
        raise TypeError(f"the ops of one service begin with one name and a dot, not {sorted(roles)}")
    return roles.pop()
