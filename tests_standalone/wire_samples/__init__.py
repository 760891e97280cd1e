"""Streams in the shapes that upstreams send, byte for byte. Written by hand after their documentation."""

from pathlib import Path


def sample(name: str) -> bytes:
    return Path(__file__).with_name(f"{name}.sse").read_bytes()
