"""Upstreams that answer chat requests, one module per wire format."""
