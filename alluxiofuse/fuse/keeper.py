"""The keeper: a small process that owns a mount's /dev/fuse, so that the mount outlives its daemon.

It starts the daemon again when that dies, or when it is asked to (an upgrade), and passes signals on. It
is run as a script without the package (`keeping.begin`), and imports next to nothing, as it stays:

    python -I -S keeper.py SOCKET MEMORY CHILD DIRECTORY COMMAND...

Messages of the daemon, each of one kind (its first byte), with fields that end in zero bytes:
M mounted, with the descriptors (fuse, socket to listen on): mount point, path of that socket
S what the next daemon is given: it can be started from now on     R it answers (descriptors: stdout, stderr)
E the end is ordered: nothing is mounted any more                  H it ends, to be followed by another
To the daemon: T, what S said, first thing; U: hand over.
"""

from __future__ import annotations

import _socket
import os
import select
import signal
import sys
import time

FORMAT = 1
"""Of `memory` and of the messages: who asks for an upgrade has to know it."""
MAX_CRASHES = 10
CRASH_WINDOW_S = 60.0
FIRST_DELAY_S, MAX_DELAY_S = 0.1, 5.0
"""Before the second start within the window; it doubles."""
HAND_OVER_S = 20.0
"""A daemon that has not handed over by then is killed, which loses nothing either."""
LOOK_S = 1.0
"""How often a daemon is looked at: of the end of its first thread the kernel tells nobody while another one
lives, which may wait for a page that is being read: the next daemon's answer frees it."""
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
MESSAGE_BYTES = 1 << 16
GAVE_UP = 1
VARIABLE = "ALLUXIOFUSE_KEEPER"


def say(text: str) -> None:
    try:
        os.write(2, f"alluxiofuse: {text}\n".encode("utf-8", "replace"))
    except OSError:
        pass  # nobody is left to be told


def stand_apart() -> None:
    """Of a daemon: Ctrl-C is the keeper's to pass on, once. In the same session, though: the kernel schedules
    another one's processes as another user's (autogroups), and each request would wait for its turn."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # What it has to say it says to the terminal, as before.


class Keeper:
    def __init__(self, sock: int, memory: int, child: int, directory: str, command: list[str]) -> None:
        self.sock = _socket.socket(fileno=sock)
        self.sock.setblocking(False)
        self.memory = memory
        self.child = child
        """0: none now."""
        self.was_ended = False
        """At the last look the child's first thread had ended, and others had not."""
        self.look_at = 0.0
        self.stragglers: list[int] = []
        """Former daemons of which a thread has not ended yet."""
        self.directory = directory
        self.command = command
        self.fuse = -1
        self.mountpoint = b""
        self.listener: _socket.socket | None = None
        self.listener_path = b""
        self.state: bytes | None = None
        """What the next daemon is given; None: there can be none."""
        self.has_ended = self.was_ready = self.is_stopping = False
        self.answers = False
        """The present daemon does."""
        self.crashes: list[float] = []
        self.start_at = 0.0
        """When to start the next one, while there is none."""
        self.asker: _socket.socket | None = None
        """Waits for an upgrade."""
        self.former_command: list[str] = []
        """To go back to, while an upgrade is under way."""
        self.kill_at = 0.0
        self.wakeup, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in (*STOPPING, signal.SIGCHLD):
            if signal.getsignal(number) != signal.SIG_IGN or number == signal.SIGCHLD:
                signal.signal(number, lambda *_: None)

    def run(self) -> int:
        """The exit code."""
        os.kill(os.getpid(), signal.SIGCHLD)  # It may have ended before we heard of it.
        while True:
            poll = select.poll()
            poll.register(self.wakeup, select.POLLIN)
            if self.sock.fileno() >= 0:
                poll.register(self.sock.fileno(), select.POLLIN)
            if self.listener is not None and self.asker is None:
                poll.register(self.listener.fileno(), select.POLLIN)
            if not self.child and self.fuse >= 0:
                poll.register(self.fuse, 0)
            for fd, event in poll.poll(self.timeout_ms()):
                if fd == self.wakeup:
                    for number in os.read(self.wakeup, 100):
                        self.signalled(number)
                elif fd == self.sock.fileno():
                    self.hear()
                elif self.listener is not None and fd == self.listener.fileno():
                    self.asked()
                elif fd == self.fuse and event & select.POLLERR:
                    return 0  # Unmounted while there was no daemon.
            code = self.reap()
            if code is not None:
                return code
            now = time.monotonic()
            if self.kill_at and now >= self.kill_at and self.child:
                self.kill_at = 0.0
                os.kill(self.child, signal.SIGKILL)
            if not self.child:
                if self.is_stopping:
                    self.unmount()
                    return 0
                if now >= self.start_at:
                    self.start()

    def timeout_ms(self) -> int:
        at = self.start_at
        if self.child:
            at = min(self.look_at, self.kill_at or self.look_at)
        if not at:
            return 0
        return max(0, int((at - time.monotonic()) * 1000) + 1)

    def signalled(self, number: int) -> None:
        if number == signal.SIGCHLD:
            return
        self.is_stopping = True
        if self.child:
            os.kill(self.child, number)

    # --- the daemon -----------------------------------------------------------------------------------

    def hear(self) -> None:
        try:
            data, extra, _, _ = self.sock.recvmsg(
                MESSAGE_BYTES, _socket.CMSG_SPACE(8), _socket.MSG_CMSG_CLOEXEC
            )
        except OSError:
            data, extra = b"", []
        fds = [
            int.from_bytes(one[2][i : i + 4], sys.byteorder)
            for one in extra
            for i in range(0, len(one[2]), 4)
        ]
        kind, fields = data[:1], data[1:].split(b"\0")
        if kind == b"M":
            self.fuse = fds[0]
            self.listener = _socket.socket(fileno=fds[1]) if len(fds) > 1 else None
            self.mountpoint, self.listener_path = fields[0], fields[1]
        elif kind == b"S":
            self.state = data[1:]
        elif kind == b"R":
            self.was_ready = self.answers = True
            for number, fd in enumerate(fds, 1):
                os.dup2(fd, number)
                os.close(fd)
            if self.asker is not None:
                self.former_command = []
                self.reply(b"ok")
        elif kind == b"E":
            self.has_ended = True
        elif not data:
            self.sock.close()

    def reap(self) -> int | None:
        """When the daemon is gone: the exit code, if that is the end."""
        if not self.child:
            return None
        self.stragglers = [pid for pid in self.stragglers if not os.waitpid(pid, os.WNOHANG)[0]]
        child, status = os.waitpid(self.child, os.WNOHANG)
        if not child:
            found = self.look()
            if found is None:
                return None
            self.stragglers.append(self.child)
            status = found
        self.was_ended, self.look_at = False, 0.0
        while self.sock.fileno() >= 0:  # Its last words.
            self.hear()
        code = os.waitstatus_to_exitcode(status)
        self.child, self.kill_at = 0, 0.0
        answered, self.answers = self.answers, False
        if self.has_ended or self.is_gone() or not self.was_ready or self.is_stopping:
            if self.fuse >= 0 and not self.has_ended and not self.is_gone():
                self.unmount()
            return code if code >= 0 else 128 - code if not self.is_gone() or not self.was_ready else 0
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        if self.state is None:
            say(f"error: the daemon of {self.name} ended {how}, and this mount can't outlive it: unmounted")
            self.unmount()
            return GAVE_UP
        if self.asker is not None and answered:
            self.start_at = 0.0  # It has handed over.
            return None
        if self.former_command:
            self.command, self.former_command = self.former_command, []
            self.reply(f"the new version ended {how}: back to the one before".encode())
        return self.crashed(how)

    def crashed(self, how: str) -> int | None:
        now = time.monotonic()
        self.crashes = [one for one in self.crashes if one > now - CRASH_WINDOW_S] + [now]
        count = len(self.crashes)
        if count >= MAX_CRASHES:
            say(
                f"error: the daemon of {self.name} ended {count} times within {CRASH_WINDOW_S:.0f} s, "
                f"at last {how}: unmounted"
            )
            self.unmount()
            return GAVE_UP
        self.start_at = now + (min(MAX_DELAY_S, FIRST_DELAY_S * 2 ** (count - 2)) if count > 1 else 0.0)
        say(f"warning: the daemon of {self.name} ended {how}: it is started again")
        return None

    @property
    def name(self) -> str:
        return os.fsdecode(self.mountpoint)

    def is_gone(self) -> bool:
        """The kernel has let go of the mount."""
        if self.fuse < 0:
            return False
        poll = select.poll()
        poll.register(self.fuse, 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))

    def start(self) -> None:
        ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        assert self.state is not None
        ours.send(b"T" + self.state)
        keeper = os.getpid()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        self.child = os.fork()
        if not self.child:
            try:
                self.become_daemon(theirs.fileno(), keeper)
            finally:
                os._exit(127)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
        theirs.close()
        ours.setblocking(False)
        self.sock = ours

    def look(self) -> int | None:
        """The child's status, as of waitpid(2), when only threads of it are left that do not end."""
        now = time.monotonic()
        if now < self.look_at:
            return None
        self.look_at = now + LOOK_S
        try:
            with open(f"/proc/{self.child}/stat", "rb") as file:
                fields = file.read().rpartition(b") ")[2].split()
            has_ended, status = fields[0] == b"Z", int(fields[-1]) or signal.SIGKILL
        except (OSError, ValueError, IndexError):
            return None
        was_ended, self.was_ended = self.was_ended, has_ended
        return status if has_ended and was_ended else None

    def become_daemon(self, sock: int, keeper: int) -> None:
        signal.set_wakeup_fd(-1)
        for number in STOPPING:  # One that is passed on now ends it: our handlers would swallow it.
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
        stand_apart()
        mount = os.fsdecode(self.mountpoint)
        inside = self.directory == mount or self.directory.startswith(mount.rstrip("/") + "/")
        try:
            os.chdir("/" if inside else self.directory)  # It would ask the daemon.
        except OSError:
            os.chdir("/")
        for fd in (sock, self.memory, self.fuse):
            os.set_inheritable(fd, True)
        environment = {**os.environ, VARIABLE: f"{sock},{self.memory},{self.fuse},{keeper}"}
        os.execve(self.command[0], self.command, environment)  # noqa: S606

    def unmount(self) -> None:
        """Lazily: programs that use it get errors from now on, also where a straggler is left."""
        command = ["umount", "-f", "-l", "-i", "--no-canonicalize", "--", self.name]
        if os.geteuid() != 0:
            command = ["fusermount3", "-u", "-z", "--", self.name]
        path = os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        for _ in range(3):
            child = os.fork()
            if child:
                if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) >= 0:
                    return  # Else somebody has killed it.
                continue
            try:
                os.execvpe(command[0], command, {**os.environ, "PATH": path})  # noqa: S606
            finally:
                os._exit(127)

    # --- upgrades -------------------------------------------------------------------------------------

    def asked(self) -> None:
        """Somebody wants another version: format, then the words with which its program is started."""
        assert self.listener is not None
        fd, _ = self.listener._accept()  # type: ignore[attr-defined]
        peer = _socket.socket(fileno=fd)
        peer.settimeout(1.0)
        uid = int.from_bytes(peer.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12)[4:8], sys.byteorder)
        if uid not in (0, os.geteuid()):
            peer.close()
            return
        self.asker = peer
        try:
            words = [os.fsdecode(word) for word in peer.recv(MESSAGE_BYTES).split(b"\0")]
        except OSError:
            words = []
        if not words or words[0] != str(FORMAT):
            self.reply(
                b"this mount was begun by a version that can't be followed by this one: mount it again"
            )
        elif self.state is None or not self.answers:
            self.reply(b"its daemon does not answer yet, or can't be replaced: try again")
        else:
            self.former_command = self.command
            program, rest = self.command[:PROGRAM_WORDS], self.command[PROGRAM_WORDS:]
            self.command = (words[1:] if len(words) == 1 + len(program) else program) + rest
            self.kill_at = time.monotonic() + HAND_OVER_S
            try:
                self.sock.send(b"U")
            except OSError:
                pass  # it is ending already

    def reply(self, text: bytes) -> None:
        if self.asker is not None:
            try:
                self.asker.send(text)
            except OSError:
                pass  # it did not wait
            self.asker.close()
            self.asker = None

    def clear(self) -> None:
        if self.listener_path:
            try:
                os.unlink(self.listener_path)
            except OSError:
                pass  # gone already


PROGRAM_WORDS = 4
"""How many words of the command name the program: an interpreter, its options, a module."""


def main() -> None:
    sock, memory, child = (int(word) for word in sys.argv[1:4])
    for fd in (sock, memory):
        os.set_inheritable(fd, False)
    keeper = Keeper(sock, memory, child, sys.argv[4], sys.argv[5:])
    code = keeper.run()
    keeper.clear()
    os._exit(code)


if __name__ == "__main__":
    main()
