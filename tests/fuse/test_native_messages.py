"""The kernel's protocol as bytes: layouts, any bytes, answers. No kernel, no filesystem."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alluxiofuse.fuse.native import abi, messages
from alluxiofuse.fuse.native.abi import IN_HEADER, REQUESTS, Op
from alluxiofuse.fuse.native.messages import Listing, Malformed, Request, decode

HEADER = Path("/usr/include/linux/fuse.h")


def request(op: int, body: bytes, *, unique: int = 7, nodeid: int = 1, length: int | None = None) -> bytes:
    size = IN_HEADER.size + len(body) if length is None else length
    return IN_HEADER.pack(size, op, unique, nodeid, 1000, 100, 42, 0, 0) + body


def whole(raw: bytes) -> Request:
    return decode(memoryview(raw))


def test_layouts_are_the_kernels(tmp_path: Path) -> None:
    if not HEADER.exists():
        pytest.skip("no linux/fuse.h")
    text = HEADER.read_text()
    names = [name for name in abi.LAYOUTS if f"struct {name} {{" in text]
    assert len(names) > len(abi.LAYOUTS) // 2
    lines = "".join(f'printf("{name} %zu\\n", sizeof(struct {name}));' for name in names)
    source = tmp_path / "sizes.c"
    source.write_text(
        f"#include <stdio.h>\n#include <linux/fuse.h>\nint main(void) {{ {lines} return 0; }}\n"
    )
    subprocess.run(["gcc", source, "-o", tmp_path / "sizes"], check=True)
    found = subprocess.run([tmp_path / "sizes"], check=True, capture_output=True, text=True).stdout
    sizes = dict(line.split() for line in found.splitlines())
    assert {name: int(size) for name, size in sizes.items()} == {name: abi.LAYOUTS[name] for name in names}


def test_numbers_are_the_kernels() -> None:
    if not HEADER.exists():
        pytest.skip("no linux/fuse.h")
    text = HEADER.read_text()
    opcodes = dict(re.findall(r"FUSE_(\w+)\s*=\s*(\d+),", text))
    compared = 0
    for op in Op:
        if op.name in opcodes:
            compared += 1
            assert int(opcodes[op.name]) == op, op.name
    assert compared > 40
    bits = {name: int(bit) for name, bit in re.findall(r"#define FUSE_(\w+)\s+\(1(?:ULL)? << (\d+)\)", text)}
    for flag in abi.Init:
        if flag.name in bits:
            assert 1 << bits[flag.name] == flag, flag.name
    fopen = {name: int(bit) for name, bit in re.findall(r"#define FOPEN_(\w+)\s+\(1 << (\d+)\)", text)}
    for one in abi.Fopen:
        if one.name in fopen:
            assert 1 << fopen[one.name] == one, one.name
    fattr = {name: int(bit) for name, bit in re.findall(r"#define FATTR_(\w+)\s+\(1 << (\d+)\)", text)}
    assert {name: 1 << bit for name, bit in fattr.items()} == {flag.name: int(flag) for flag in abi.Fattr}


def test_requests_with_names() -> None:
    found = whole(request(Op.LOOKUP, b"name\0"))
    assert (found.opcode, found.unique, found.nodeid) == (Op.LOOKUP, 7, 1)
    assert (found.uid, found.gid, found.pid) == (1000, 100, 42)
    assert found.names == (b"name",)
    renamed = whole(request(Op.RENAME2, abi.REQUESTS[Op.RENAME2].struct.pack(9, 1) + b"old\0\xff new\0"))
    assert renamed.fields == (9, 1)
    assert renamed.names == (b"old", b"\xff new")
    linked = whole(request(Op.SYMLINK, b"name\0the/target\0"))
    assert linked.names == (b"name", b"the/target")


def test_requests_with_data() -> None:
    body = REQUESTS[Op.WRITE].struct.pack(3, 4096, 5, 0, 0, 0) + b"bytes"
    found = whole(request(Op.WRITE, body))
    assert found.fields[:3] == (3, 4096, 5)
    assert found.data is not None
    assert bytes(found.data) == b"bytes"
    with pytest.raises(Malformed, match="cut short"):
        whole(request(Op.WRITE, body[:-1]))
    value = REQUESTS[Op.SETXATTR].struct.pack(3, 1) + b"user.a\0val"
    found = whole(request(Op.SETXATTR, value))
    assert found.data is not None
    assert (found.fields, found.names, bytes(found.data)) == ((3, 1), (b"user.a",), b"val")
    forgotten = abi.FORGET_ONE.pack(5, 2) + abi.FORGET_ONE.pack(6, 1)
    found = whole(request(Op.BATCH_FORGET, REQUESTS[Op.BATCH_FORGET].struct.pack(2) + forgotten))
    assert list(messages.forgets(found)) == [(5, 2), (6, 1)]
    assert list(messages.forgets(whole(request(Op.FORGET, (3).to_bytes(8, "little"), nodeid=9)))) == [(9, 3)]


def test_extensions_behind_the_names_are_passed_over() -> None:
    body = b"name\0" + bytes(3) + b"extension's bytes".ljust(24, b"\0")
    raw = IN_HEADER.pack(IN_HEADER.size + len(body), Op.UNLINK, 1, 1, 0, 0, 0, 3, 0) + body
    assert whole(raw).names == (b"name",)


@pytest.mark.parametrize("op", list(REQUESTS))
def test_truncated_requests_are_malformed(op: Op) -> None:
    body = REQUESTS[op]
    raw = request(op, body.struct.pack(*[0] * len(body.struct.unpack(bytes(body.struct.size)))) + b"a\0b\0")
    whole(raw)
    need = body.struct.size + 2 * body.names
    for size in range(IN_HEADER.size + need):
        cut = raw[:size]
        with pytest.raises(Malformed):
            whole(cut)  # the header says more
        if size >= IN_HEADER.size:
            honest = request(op, cut[IN_HEADER.size :])
            with pytest.raises(Malformed) as caught:
                whole(honest)
            assert caught.value.unique == 7


@given(st.binary(max_size=400))
def test_any_bytes(raw: bytes) -> None:
    try:
        whole(raw)
    except Malformed:
        pass


@given(st.integers(0, 70), st.binary(max_size=300))
def test_any_body(op: int, body: bytes) -> None:
    try:
        found = whole(request(op, body))
    except Malformed:
        return
    assert found.unique == 7
    if found.opcode in (Op.FORGET, Op.BATCH_FORGET):
        list(messages.forgets(found))


def test_init_of_old_and_new_kernels() -> None:
    old = whole(request(Op.INIT, abi.INIT_IN_SHORT.pack(7, 31, 1 << 17, 0xFFFF)))
    assert messages.init_fields(old) == (7, 31, 1 << 17, 0xFFFF)
    new = whole(request(Op.INIT, abi.INIT_IN.pack(7, 45, 1 << 17, 1 << 30, 1 << 5)))
    assert messages.init_fields(new)[3] == 1 << 30 | abi.Init.PASSTHROUGH
    with pytest.raises(Malformed):
        messages.init_fields(whole(request(Op.INIT, b"short")))


def attributes(**changes: int) -> messages.Attributes:
    found = messages.Attributes()
    found.st_ino, found.st_mode, found.st_nlink, found.st_uid, found.st_gid = 5, 0o100644, 1, 1, 2
    found.st_size, found.st_blocks, found.st_blksize = 10, 8, 4096
    found.st_atime_ns, found.st_mtime_ns, found.st_ctime_ns = -1, 1_500_000_000_123_456_789, -(10**9) - 5
    found.entry_timeout, found.attr_timeout = 1.5, 1e12
    for name, value in changes.items():
        setattr(found, name, value)
    return found


def test_attributes_keep_times_before_1970() -> None:
    found = abi.ATTR.unpack(messages.attributes(attributes()))
    assert found[3:9] == (-1, 1_500_000_000, -2, 999_999_999, 123_456_789, 999_999_995)
    entry = messages.entry_out(attributes())
    assert abi.ENTRY_OUT.unpack_from(entry) == (5, 0, 1, 1 << 32, 500_000_000, 0)


def test_a_listing_is_full_when_its_bytes_are() -> None:
    listing = Listing(500, is_plus=True)
    assert listing.add(b"a", attributes(), 3)
    assert listing.add(b"..", attributes(st_mode=0o40755), 4, has_reference=False)
    assert listing.add(b"x" * 8, attributes(), 5)
    assert not listing.add(b"b", attributes(), 6)
    raw = listing.payload()
    assert len(raw) == 3 * (128 + 24 + 8)
    ino, position, length, kind = abi.DIRENT.unpack_from(raw, 128)
    assert (ino, position, length, kind) == (5, 3, 1, 8)
    assert not any(raw[160 : 160 + 128]), "no reference for dots"
    assert listing.unreferenced == []
    plain = Listing(100, is_plus=False)
    assert plain.add(b"a", attributes(), 3)
    assert plain.unreferenced == [(5, 1)]
