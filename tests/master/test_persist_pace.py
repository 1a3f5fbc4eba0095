"""The persister gives way to programs that change much, for a while."""

from __future__ import annotations

import pytest

from alluxiofuse.master.persist_pace import BUSY_PER_S, SAMPLE_S, Pace


def test_it_gives_way_while_changes_come_quickly() -> None:
    pace, now, count = Pace(5.0), 1000.0, 0
    assert not pace.gives_way(now, count)
    for _ in range(49):
        now, count = now + SAMPLE_S, count + round(2 * BUSY_PER_S * SAMPLE_S)
        assert pace.gives_way(now, count)
        assert pace.gives_way(now + SAMPLE_S / 2, count), "between two samples as before"
    assert not pace.gives_way(now + SAMPLE_S, count)


def test_not_for_longer_than_its_patience_and_again_after_a_pause() -> None:
    pace, now, count = Pace(5.0), 1000.0, 0
    pace.gives_way(now, count)
    gave_way = 0
    for _ in range(100):
        now, count = now + SAMPLE_S, count + round(2 * BUSY_PER_S * SAMPLE_S)
        gave_way += pace.gives_way(now, count)
    assert gave_way == pytest.approx(5.0 / SAMPLE_S, abs=1)
    now += SAMPLE_S
    assert not pace.gives_way(now, count)
    now, count = now + SAMPLE_S, count + round(2 * BUSY_PER_S * SAMPLE_S)
    assert pace.gives_way(now, count)


def test_after_long_idleness_the_first_changes_count_as_few() -> None:
    pace = Pace(5.0)
    pace.gives_way(1000.0, 0)
    assert not pace.gives_way(4000.0, 1000)
