"""Bytes to values and back. Nothing here awaits, reads a clock or opens a socket."""


class WireError(ValueError):
    """Bytes that do not follow the format; the message says what is wrong with them."""
