"""The tests; what is said here holds before any of them imports torch."""

import os

# Threads that wait for others sleep. If they spun, parallel test processes would take the processors from each other.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
