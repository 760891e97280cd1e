"""A drop-in OpenAI-compatible gateway: any OpenAI SDK in, any backend out, every token written down.

This module stays empty but for the version, so that `gateway --version` costs no imports.
"""

__version__ = "0.1.0"
