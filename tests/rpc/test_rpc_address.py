from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alluxiofuse.errors import UserError
from alluxiofuse.rpc.address import Address, TcpAddress, UnixAddress, parse_address


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("localhost:19998", TcpAddress("localhost", 19998)),
        (" 10.0.0.1:1 ", TcpAddress("10.0.0.1", 1)),
        ("[::1]:29999", TcpAddress("::1", 29999)),
        ("unix:/run/x.sock", UnixAddress("/run/x.sock")),
        ("/run/x.sock", UnixAddress("/run/x.sock")),
    ],
)
def test_addresses(text: str, expected: Address) -> None:
    assert parse_address(text) == expected
    assert parse_address(str(expected)) == expected


def test_default_port() -> None:
    assert parse_address("host", 19998) == TcpAddress("host", 19998)
    assert parse_address("[::1]", 19998) == TcpAddress("::1", 19998)
    with pytest.raises(UserError, match="no port"):
        parse_address("host")


@pytest.mark.parametrize(
    "text",
    ["", ":", ":1", "host:", "host:x", "host:65536", "host:-1", "host:١", "::1:1", "[::1", "[]:1", "[::1]x:1",
     "a b:1", "unix:", "unix:relative", "/" + "x" * 107, "/a\0b", "x" * 300 + ":1", "host:1/path"],
)  # fmt: skip
def test_mistakes_are_named(text: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_address(text)
    assert "\n" not in caught.value.message


@given(st.text())
def test_any_text_is_an_address_or_a_mistake(text: str) -> None:
    try:
        parse_address(text, 1)
    except UserError:
        pass
