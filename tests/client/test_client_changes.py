"""ChangeLog: which answers are out of date."""

from alluxiofuse.client.changes import ChangeLog


def test_an_answer_is_current_while_nothing_changed() -> None:
    log = ChangeLog()
    assert log.is_current(log.now, 5)


def test_only_what_changed_is_out_of_date() -> None:
    log = ChangeLog()
    since = log.now
    log.note(5, (1, b"a"))
    assert not log.is_current(since, 5)
    assert not log.is_current(since, (1, b"a"))
    assert not log.is_current(since, 7, 5)
    assert log.is_current(since, 6, (1, b"b"))
    assert log.is_current(log.now, 5)


def test_after_everything_may_have_changed_no_older_answer_counts() -> None:
    log = ChangeLog()
    since = log.now
    log.note_all()
    assert not log.is_current(since, 99)
    assert log.is_current(log.now, 99)


def test_forgotten_changes_make_older_answers_out_of_date_not_current() -> None:
    log = ChangeLog(max_keys=3)
    since = log.now
    for ino in range(10, 16):
        log.note(ino)
    assert not log.is_current(since, 10)  # its note was dropped
    assert not log.is_current(since, 999)
    assert log.is_current(log.now, 10)


def test_a_key_that_changes_again_stays_the_youngest() -> None:
    log = ChangeLog(max_keys=2)
    log.note(1)
    log.note(2)
    since = log.now
    log.note(1)
    log.note(3)
    assert not log.is_current(since, 1)
