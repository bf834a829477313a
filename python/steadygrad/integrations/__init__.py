"""Callbacks for training libraries; they are optional, and using an optimizer needs none of them.

Import each module by its own name; only then does it import its library:

>>> from steadygrad.integrations.lightning import StabilizerMonitor
>>> from steadygrad.integrations.transformers import StabilizerCallback
"""

from __future__ import annotations

__all__: list[str] = []
