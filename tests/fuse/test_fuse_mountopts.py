"""-o options."""

import pytest

from alluxiofuse.errors import UserError
from alluxiofuse.fuse.mountopts import MountOptions, parse
from alluxiofuse.fuse.pyfuse3_driver import kernel_options
from alluxiofuse.fuse.session import plain


def test_defaults() -> None:
    assert parse([]) == MountOptions()


def test_what_mount_8_passes_is_taken() -> None:
    options = parse(
        [
            "rw,noatime,noexec,nosuid,nodev,secret_file=/x,_netdev,nofail,user",
            "x-systemd.automount,comment=a b",
        ]
    )
    assert options.kernel == ["noatime", "noexec", "nosuid", "nodev"]
    assert options.secret_file == "/x"  # noqa: S105
    assert not options.is_readonly


def test_the_last_of_two_contradicting_options_holds() -> None:
    assert parse(["ro,rw"]).is_readonly is False
    assert parse(["rw", "ro"]).is_readonly is True
    assert parse(["nodev,dev,nosuid,suid,suid"]).kernel == ["dev", "suid"]


def test_ours() -> None:
    options = parse(["write_type=cache_through,attr_timeout=1.5,read_ahead=8MB,config=/c,log_file=/l"])
    assert options.write_type == "CACHE_THROUGH"
    assert options.cache_limit_s == 1.5
    assert options.read_ahead_bytes == 8 << 20
    assert (options.config_file, options.log_file) == ("/c", "/l")
    assert parse(["nonempty"]).is_nonempty_allowed
    assert parse(["session=pyfuse3"]).session == "pyfuse3"


def test_a_comma_in_a_value_is_escaped() -> None:
    assert parse([r"secret_file=/a\,b"]).secret_file == "/a,b"  # noqa: S105


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("frobnicate", "frobnicate"),
        ("frobnicate=1", "frobnicate"),
        ("session=x", "session=x"),
        ("write_type=FAST", "FAST"),
        ("attr_timeout=-1", "attr_timeout"),
        ("attr_timeout=soon", "attr_timeout"),
        ("attr_timeout=nan", "attr_timeout"),
        ("read_ahead=many", "read_ahead"),
        ("secret_file=", "secret_file"),
        ("secret_file", "secret_file"),
        ("remount,ro", "remount"),
        ("sync_interval=5", "attr_timeout"),
        ("worker=h:1", "later version"),
    ],
)
def test_what_is_wrong_is_named(text: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        parse([text])


def test_sloppy_skips_the_unknown_only() -> None:
    assert parse(["frobnicate,ro"], sloppy=True).is_readonly
    with pytest.raises(UserError):
        parse(["attr_timeout=soon"], sloppy=True)


def test_what_the_kernel_gets() -> None:
    options = parse(["ro,noexec,allow_other"])
    options.fsname = "h:1/a,b\\c/ä"
    assert kernel_options(options, plain(options.fsname)) == {
        "default_permissions",
        "subtype=alluxiofuse",
        "fsname=h:1/a\\,b\\\\c/%C3%A4",
        "ro",
        "noexec",
        "allow_other",
    }
