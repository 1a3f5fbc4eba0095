"""Whatever a handler raises becomes an errno; what programs can't be told is logged."""

import errno
import logging

import pyfuse3
import pytest
import trio

from alluxiofuse.errors import FsError, StaleError, UnavailableError
from alluxiofuse.fuse.guard import REPEAT_S, Troubles, guarded, guarded_by_inode


class Handlers:
    def __init__(self) -> None:
        self.now = 0.0
        self.troubles = Troubles(lambda: self.now)

    @guarded
    async def by_name(self, exc: BaseException) -> None:
        raise exc

    @guarded_by_inode
    async def by_inode(self, exc: BaseException) -> None:
        raise exc


def errno_from(handler: object, exc: BaseException) -> int:
    with pytest.raises(pyfuse3.FUSEError) as caught:
        trio.run(handler, exc)  # type: ignore[arg-type]
    return int(caught.value.errno)


@pytest.mark.parametrize(
    ("exc", "code"),
    [
        (FsError(errno.ENOENT), errno.ENOENT),
        (FsError(errno.ENOTEMPTY), errno.ENOTEMPTY),
        (StaleError("gone"), errno.ESTALE),
        (UnavailableError("no worker"), errno.EIO),
        (pyfuse3.FUSEError(errno.ENODATA), errno.ENODATA),
        (ValueError("bug"), errno.EIO),
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC),
        (OSError(errno.EBADF, "bug"), errno.EIO),
        (ExceptionGroup("several", [ValueError()]), errno.EIO),
        (MemoryError(), errno.EIO),
    ],
)
def test_errors_become_their_errno(exc: BaseException, code: int) -> None:
    assert errno_from(Handlers().by_name, exc) == code


def test_an_inode_that_is_gone_is_stale_never_enoent() -> None:
    assert errno_from(Handlers().by_inode, FsError(errno.ENOENT)) == errno.ESTALE
    assert errno_from(Handlers().by_inode, FsError(errno.EACCES)) == errno.EACCES


def test_ordinary_outcomes_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    errno_from(Handlers().by_name, FsError(errno.ENOENT))
    errno_from(Handlers().by_inode, StaleError())
    assert not caplog.records


def test_a_bug_is_logged_with_its_traceback_once(caplog: pytest.LogCaptureFixture) -> None:
    handlers = Handlers()
    for _ in range(3):
        errno_from(handlers.by_name, ValueError("bug"))
    assert [bool(record.exc_info) for record in caplog.records] == [True, False, False]
    assert all(record.levelno == logging.ERROR for record in caplog.records)


def test_a_failure_is_logged_once_in_a_while_with_its_count(caplog: pytest.LogCaptureFixture) -> None:
    handlers = Handlers()
    for _ in range(5):
        errno_from(handlers.by_name, UnavailableError("no worker"))
    handlers.now += REPEAT_S
    errno_from(handlers.by_name, UnavailableError("no worker"))
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) == 2
    assert "no worker" in texts[0]
    assert "4 more" in texts[1]


def test_cancellation_passes() -> None:
    async def main() -> bool:
        handlers = Handlers()
        with trio.CancelScope() as scope:
            scope.cancel()

            class Waiting(Handlers):
                @guarded
                async def wait(self) -> None:
                    await trio.sleep_forever()

            await Waiting().wait()
        assert handlers.now == 0
        return scope.cancelled_caught

    assert trio.run(main)
