"""Layer 1: what travels between daemons. No sockets here: frames, the msgpack wrapper, the
handshake and the typed messages are plain values and state machines (`rpc/` moves them)."""
