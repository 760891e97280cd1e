"""Rows: two drivers below one SQL text, and the statements by noun."""
