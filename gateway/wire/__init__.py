"""Bytes to values and back. Nothing here awaits, reads a clock or opens a socket."""
