"""Random work, a fault in the middle of it, and then the question what is left: again and again.

One round: the players work; after the n-th acknowledged operation and d milliseconds the fault
strikes; it is healed; whoever still has its mount works on for a while; then every player's tree is read,
past the kernel's page cache, through its own mount and through every other one, and compared with what was
acknowledged (oracle.py). Every few rounds all files are closed, and once the persist log is empty the store
must equal the namespace.

Operations and moments are functions of the seed, as far as real processes allow: a round's dice depend on
the seed and the round alone.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from daemons import Site
from kinds import Fault
from oracle import DIRECTORY, Found, Op, parent_of
from player import Acknowledged, FaultFailure, Player
from servers import wait_until
from stores import Store

STORE_CHECK_ROUNDS = 8
SETTLE_TIMEOUT_S = 120.0
MAX_PHANTOM_ROUNDS = 10
FRESH_TIMEOUT_S = 60.0
"""Generous: how fresh another mount is, is tested elsewhere."""


def seed_of_run() -> int:
    """FAULTS_SEED, else a new one. The caller prints it."""
    given = os.environ.get("FAULTS_SEED")
    return int(given) if given else random.SystemRandom().randrange(1 << 31)


class Harness:
    def __init__(
        self,
        site: Site,
        mounts: Sequence[Path],
        store: Store,
        seed: int,
        *,
        players_per_mount: int = 2,
        say: Callable[[str], None] = print,
    ) -> None:
        """`mounts`: FUSE mounts of one namespace, mounted. Use as a context manager, or `close` it."""
        self.site = site
        self.mounts = list(mounts)
        self.counts: Counter[str] = Counter()
        self._store = store
        self._seed = seed
        self._say = say
        self._rounds = 0
        self._spent: dict[str, float] = {}
        """Seconds of this round, by what they went to."""
        self._acknowledged = Acknowledged()
        self.players: list[Player] = []
        for number in range(players_per_mount * len(self.mounts)):
            mount = self.mounts[number % len(self.mounts)]
            name = f"actor{number}-{seed:x}"
            (mount / name).mkdir()
            self.players.append(Player(name, number + 1, mount, self._acknowledged))

    def __enter__(self) -> Harness:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for player in self.players:
            player.close()

    # --- rounds -----------------------------------------------------------------------------------

    def run(self, fault: Fault, count: int) -> None:
        """FaultFailure says what is wrong, with the seed."""
        for number in range(count):
            self._rounds += 1
            began = time.monotonic()
            try:
                self._round(fault, random.Random(f"{self._seed} {fault.name} {number}"))
                if self._rounds % STORE_CHECK_ROUNDS == 0:
                    self.check_store()
            except (AssertionError, TimeoutError) as exc:
                raise self._failure(f"{fault.name}, round {number + 1}", exc) from exc
            spent = " ".join(f"{name} {seconds:.1f}" for name, seconds in self._spent.items())
            self._spent.clear()
            self._say(
                f"{fault.name} {number + 1}/{count}: {self._acknowledged.count} operations acknowledged, "
                f"{time.monotonic() - began:.1f} s ({spent}); {dict(sorted(self.counts.items()))}"
            )

    def _round(self, fault: Fault, dice: random.Random) -> None:
        for player in self.players:
            player.start(random.Random(f"{dice.random()} {player.name}"))
        with self._timed("work"):
            self._work(dice.randrange(20, 300))
            time.sleep(dice.random() * 0.01)
        aim = fault.aim(dice)
        for player in self.players:
            player.is_struck = player.mount in aim.felt
            player.may_lapse = player.mount in aim.lapsed
        fault.strike()
        for player in self.players:
            player.note(f"--- {fault.name}: struck, round {self._rounds}")
        dying = [player for player in self.players if player.mount in aim.dead]
        for player in dying:
            player.join()
        with self._timed("heal"):
            fault.heal(dice)
        with self._timed("work after it"):
            self._work(dice.randrange(10, 60))
            for player in self.players:
                player.stop()
        for player in dying:
            player.ask("forget")
            for world in player.worlds:
                world.lose_handles()
        for player in self.players:
            if player.may_lapse:
                player.forget_nameless()
        with self._timed("check"):
            self.check()
        if dice.random() < 0.5:
            with self._timed("settle"):
                self.settle()
        for player in self.players:
            player.is_struck = player.may_lapse = False

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._spent[name] = self._spent.get(name, 0.0) + time.monotonic() - began

    def _work(self, count: int) -> None:
        """Until so many more operations were acknowledged, or nobody works any more."""
        wanted = self._acknowledged.count + count
        self._acknowledged.wait(
            lambda: self._acknowledged.count >= wanted or not any(one.is_playing for one in self.players)
        )

    # --- checks -----------------------------------------------------------------------------------

    def check(self) -> None:
        """Every tree, through every mount. Outcomes that were unknown are known then."""
        for player in self.players:
            found = self._scan(player)
            self._judge(player, found)
            player.world.accept(found)
            for mount in self.mounts:
                if mount != player.mount:
                    self._wait_same(player, mount)

    def _judge(self, player: Player, found: dict[str, Found]) -> None:
        """Keeps the one world of the player's that explains what was found."""
        wrongs = []
        for number, world in enumerate(player.worlds):
            wrong = world.differences(found)
            if not wrong:
                if len(player.worlds) > 1:
                    self.counts["not done" if number == 0 else "done, not acknowledged"] += 1
                player.worlds = [world]
                return
            wrongs.append("\n".join(wrong[:20]))
        paths = {line.partition(":")[0] for text in wrongs for line in text.splitlines()}
        raise FaultFailure(
            f"{player.name} on {player.mount}:\n" + "\nor else:\n".join(wrongs) + "\n" + player.story(*paths)
        )

    def _scan(self, player: Player) -> dict[str, Found]:
        """The player's tree through its own mount, without phantoms: those are removed until none is seen."""
        found = player.scan()
        for _ in range(MAX_PHANTOM_ROUNDS):
            phantoms = self._phantoms(player, found)
            if not phantoms:
                break
            for path in phantoms:
                self.counts["phantoms"] += 1
                with suppress(FileNotFoundError):
                    player.ask("do", Op("rmdir", path))
            found = player.scan()
        return found

    def _phantoms(self, player: Player, found: dict[str, Found]) -> list[str]:
        """Directories that should not be there and have nothing in them but such directories."""
        if not self._store.has_phantoms:
            return []
        needed = {path for world in player.worlds for path in world.names}
        needed |= {path for path, one in found.items() if one.kind != DIRECTORY}
        for path in list(needed):
            while path := parent_of(path):
                needed.add(path)
        return sorted(found.keys() - needed, reverse=True)

    def _wait_same(self, player: Player, mount: Path) -> None:
        """Names and attributes on another mount follow; what is wrong there stays wrong."""
        deadline = time.monotonic() + FRESH_TIMEOUT_S
        while True:
            try:
                self._judge(player, player.scan(mount))
                return
            except (FaultFailure, OSError) as exc:
                self.counts["looked again"] += 1
                if time.monotonic() > deadline:
                    raise FaultFailure(f"seen on {mount}: {exc}") from None
                time.sleep(0.1)

    def settle(self) -> None:
        """Someone opens, syncs and closes what killed writers left."""
        for player in self.players:
            world = player.world
            paths = [path for path, node in world.names.items() if node.is_unsettled]
            for path in paths:
                player.ask("touch", str(player.mount / player.name / path))
                player.note(f"touch path={path}")
            found = self._scan(player)
            self._judge(player, found)
            world.accept(found, settled=paths)

    def finish(self) -> None:
        """The last comparison with the store."""
        try:
            self.check_store()
        except (AssertionError, TimeoutError) as exc:
            raise self._failure("at the end", exc) from exc

    def check_store(self) -> None:
        dice = random.Random(f"{self._seed} {self._rounds} store")
        with self._timed("store"):
            self._check_store(dice)

    def _check_store(self, dice: random.Random) -> None:
        for player in self.players:
            for number in list(player.world.handles):
                player.do(Op("close", handle=number))
        wrong: list[str] = []

        def is_same() -> bool:
            if self.site.report()["persist_pending_count"]:
                return False
            whole = self.players[0].ask("scan", str(self.mounts[0]))
            wrong[:] = self._store.differences(whole)
            return not wrong and not self.site.report()["persist_pending_count"]

        try:
            wait_until(is_same, "the store equals the namespace", SETTLE_TIMEOUT_S)
        except TimeoutError as exc:
            report = self.site.report()
            about = [
                f"{name} = {report[name]}"
                for name in ("persist_pending_count", "persist_failing", "persist_waiting")
            ]
            raise FaultFailure("\n".join([str(exc), *wrong[:20], *about])) from None
        self.counts["store checks"] += 1
        if dice.random() < 0.5:
            self.site.fs("free", "-R", "/")
        for player in self.players:
            found = self._scan(player)
            self._judge(player, found)
            player.world.accept(found, settled=found)

    def _failure(self, where: str, exc: BaseException) -> FaultFailure:
        self._hold(exc)
        for player in self.players:
            player.close()
        return FaultFailure(f"FAULTS_SEED={self._seed}: {where}: {exc}\n{self._logs()}")

    def _hold(self, exc: BaseException) -> None:
        """FAULTS_HOLD=SECONDS leaves everything as it is for a while, for somebody to look at."""
        if hold_s := float(os.environ.get("FAULTS_HOLD", "0")):
            self._say(f"HOLD {self.site.base}: {exc}")
            time.sleep(hold_s)

    def _logs(self) -> str:
        return "\n".join(f"--- {one.name}\n{one.log_text()[-1500:]}" for one in self.site.daemons)
