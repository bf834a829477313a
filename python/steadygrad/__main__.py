"""``python -m steadygrad``."""

from __future__ import annotations

from .doctor import main

raise SystemExit(main())
