"""Callbacks for the libraries that people train with; plain use of an optimizer needs none of them.

Each module is imported by its own name, and only then imports its library:

>>> from steadygrad.integrations.lightning import StabilizerMonitor
>>> from steadygrad.integrations.transformers import StabilizerCallback
"""

from __future__ import annotations

__all__: list[str] = []
