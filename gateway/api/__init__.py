"""Client-facing APIs (dialects), one module each. They never import one another."""
