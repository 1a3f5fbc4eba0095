"""For whom a peer may speak. A trusted one for anybody, another one only for itself."""

from __future__ import annotations

import os
import pwd
from typing import Any

import msgspec

from alluxiofuse.errors import AuthError
from alluxiofuse.rpc.base import Peer
from alluxiofuse.wire.types import Caller

NOBODY = Caller(65534, 65534, [])


def as_peer(peer: Peer, request: Any) -> Any:
    """The request on behalf of the peer itself, if it is one that acts for somebody: a copy. AuthError
    for what nothing but a session id stands for: ids of others are easy to guess."""
    if not hasattr(request, "who"):
        if hasattr(request, "session_id"):
            raise AuthError(f"{peer.name} may not use sessions")
        return request
    return msgspec.structs.replace(request, who=caller_of(peer))


def caller_of(peer: Peer) -> Caller:
    """A peer that is not trusted, with the groups that this machine's user database gives it."""
    if peer.uid is None:
        return NOBODY
    try:
        user = pwd.getpwuid(peer.uid)
    except KeyError:
        return Caller(peer.uid, NOBODY.gid, [])
    return Caller(peer.uid, user.pw_gid, os.getgrouplist(user.pw_name, user.pw_gid))
