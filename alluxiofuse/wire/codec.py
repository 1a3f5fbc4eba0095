"""The one msgpack wrapper. Nothing else imports a msgpack library.

msgspec speaks msgpack and checks every value against its declared type while decoding, so a
message that arrives is either of the declared shape and within the declared bounds, or a
`BadRequestError`.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from alluxiofuse.errors import BadRequestError

T = TypeVar("T")
Raw = msgspec.Raw
Decoder = msgspec.msgpack.Decoder

_encoder = msgspec.msgpack.Encoder()
_decoders: dict[Any, msgspec.msgpack.Decoder[Any]] = {}


def encode(value: object) -> bytes:
    return _encoder.encode(value)


def decoder(type_: type[T]) -> msgspec.msgpack.Decoder[T]:
    """A cached decoder; for hot paths that keep it and handle `msgspec.MsgspecError` themselves."""
    found = _decoders.get(type_)
    if found is None:
        found = _decoders[type_] = msgspec.msgpack.Decoder(type_)
    return found


def decode(data: bytes | bytearray | memoryview | Raw, type_: type[T]) -> T:
    """`data` as a `type_`; BadRequestError says which field is wrong, never its value."""
    try:
        return decoder(type_).decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as exc:
        raise BadRequestError(f"malformed message: {exc}") from None
