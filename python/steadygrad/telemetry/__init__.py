"""Records of stabilized steps: arrays, a report, a plot, and writers."""

from __future__ import annotations

from steadygrad.telemetry.history import History, StepRecord
from steadygrad.telemetry.recorder import TooManySkippedSteps
from steadygrad.telemetry.report import Explosion, Report
from steadygrad.telemetry.settings import Level, Telemetry, Writer
from steadygrad.telemetry.writers import CSVWriter, JSONLWriter, TensorBoardWriter

__all__ = [
    "CSVWriter",
    "Explosion",
    "History",
    "JSONLWriter",
    "Level",
    "Report",
    "StepRecord",
    "Telemetry",
    "TensorBoardWriter",
    "TooManySkippedSteps",
    "Writer",
]
