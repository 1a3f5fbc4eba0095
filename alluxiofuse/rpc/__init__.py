"""Layer 2: moves the messages of `wire/` over TCP, Unix sockets, or within one process."""
