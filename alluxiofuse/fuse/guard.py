"""The one place where every error of a FUSE handler ends.

pyfuse3 lets nothing but FUSEError out of a handler: any other exception would end the session and
leave a dead mount. Cancellation passes, it is how the session ends.
"""

from __future__ import annotations

import errno
import functools
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import pyfuse3

from alluxiofuse.descriptors import EXHAUSTED
from alluxiofuse.errors import AlluxioFuseError, FsError, StaleError
from alluxiofuse.rpc.interrupt import serving

log = logging.getLogger("alluxiofuse.fuse")

P = ParamSpec("P")
T = TypeVar("T")

REPEAT_S = 10.0
"""The same trouble is logged again after this long, with the number of times it was left out."""

_PASSED_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})
"""Of an OSError that nobody translated; everything else is EIO."""


class Troubles:
    """Logs what programs on the mount can't be told in an errno: bugs once per kind with their
    traceback, failures of the system behind us one line every `REPEAT_S`. Trio thread only."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._bugs: set[tuple[str, type[BaseException]]] = set()
        self._failures: dict[tuple[str, str], tuple[float, int]] = {}
        """(handler, code) -> (when logged last, how often left out since)."""

    def failure(self, handler: str, exc: AlluxioFuseError) -> None:
        key = (handler, exc.code)
        logged_at, left_out = self._failures.get(key, (-REPEAT_S, 0))
        if self._clock() - logged_at < REPEAT_S:
            self._failures[key] = (logged_at, left_out + 1)
            return
        self._failures[key] = (self._clock(), 0)
        more = f" (and {left_out} more since the last such line)" if left_out else ""
        log.warning("%s failed: %s: %s%s", handler, exc.code, exc.message, more)

    def bug(self, handler: str, exc: Exception) -> None:
        key = (handler, type(exc))
        if key in self._bugs:
            log.error("%s failed again: %r", handler, exc)
            return
        self._bugs.add(key)
        log.error("%s failed unexpectedly; answered with an error, going on", handler, exc_info=exc)


class HasTroubles(Protocol):
    @property
    def troubles(self) -> Troubles: ...


S = TypeVar("S", bound=HasTroubles)


def errno_of(troubles: Troubles, handler: str, exc: Exception) -> int:
    """What the program is told; logs what has to be logged."""
    if isinstance(exc, AlluxioFuseError):
        if not isinstance(exc, FsError | StaleError):
            troubles.failure(handler, exc)
        return exc.errno or errno.EIO
    if isinstance(exc, OSError) and exc.errno in EXHAUSTED:
        troubles.failure(handler, FsError(exc.errno))
        return exc.errno
    troubles.bug(handler, exc)
    if isinstance(exc, OSError) and exc.errno in _PASSED_ERRNOS:
        return exc.errno
    return errno.EIO


def _thread_of(args: tuple[object, ...]) -> int:
    """Who asks; 0 where the kernel does not say so, or must not be answered before all is done (flush)."""
    context = args[-1] if args else None
    return getattr(context, "pid", 0)


def guarded(
    handler: Callable[Concatenate[S, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, T]]:
    """Of a handler that names things by (parent, name)."""
    return _guarded(handler, lambda code: code)


def guarded_by_inode(
    handler: Callable[Concatenate[S, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, T]]:
    """Of a handler that is given an inode: if that is gone, ESTALE makes the kernel look its path up
    again (path_openat and friends retry with LOOKUP_REVAL), while ENOENT would reach the program
    though the name exists."""
    return _guarded(handler, lambda code: errno.ESTALE if code == errno.ENOENT else code)


def _guarded(
    handler: Callable[Concatenate[S, P], Coroutine[Any, Any, T]], told: Callable[[int], int]
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, T]]:
    """`told`: errno of what went wrong -> errno for the kernel."""
    name = handler.__name__

    @functools.wraps(handler)
    async def call(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        serving.set(_thread_of(args))
        try:
            return await handler(self, *args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except Exception as exc:
            raise pyfuse3.FUSEError(told(errno_of(self.troubles, name, exc))) from None

    return call
