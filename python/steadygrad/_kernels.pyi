"""The compiled kernels and the checks of their arguments; only the public functions call them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Allocate = Callable[[int], Tensor]
NormTensors = tuple[Tensor, Tensor, Tensor] | None
VERSION: str
# Keys of every param group: its limits, and the counters of steps.
LIMITS: tuple[str, ...]
CLIPPING: str
COUNTERS: tuple[str, str]
ROUNDED_STEPS: str
# The places of values in rows of numbers, and in the bytes of an outcome.
POLICY_ROW: dict[str, int]
TELEMETRY_COLUMNS: dict[str, int]
TELEMETRY_FLAGS: dict[str, int]
SCOPE_COLUMNS: tuple[str, ...]
OUTCOME_OFFSETS: dict[str, int]
OUTCOME_BYTES: int

def launch_count() -> int: ...
def build_info() -> dict[str, object]: ...
def is_asynchronous(device_type: str) -> bool: ...
def grad_norm(
    tensors: list[Tensor],
    norm_type: float,
    output: NormTensors,
    allocate: Allocate,
    reduction: Reduction | None = None,
) -> tuple[float, int, bool]: ...
def clip_grad_norm_(
    grads: list[Tensor],
    max_norm: float,
    norm_type: float,
    error_if_nonfinite: bool,
    output: NormTensors,
    allocate: Allocate,
    reduction: Reduction | None = None,
) -> tuple[float, int, bool]: ...
def clip_grads_with_norm_(
    grads: list[Tensor], max_norm: float, total_norm: float | Tensor, allocate: Allocate
) -> None: ...
def clip_grad_value_(grads: list[Tensor], clip_value: float, allocate: Allocate) -> None: ...
def add_penalty_(
    params: list[Tensor],
    grads: list[Tensor],
    l1: float,
    l2: float,
    value: Tensor | None,
    allocate: Allocate,
) -> float: ...
def soft_threshold_(params: list[Tensor], amount: float, allocate: Allocate) -> None: ...

class Reduction:
    """The rows of sums, which tensors this process counts, and what is called to combine rows and to ask a policy."""

    rows: Tensor
    counted: Tensor
    reduce: Callable[[], None] | None
    ask_policy: Callable[[], None] | None
    def __init__(
        self,
        *,
        rows: Tensor,
        counted: Tensor,
        reduce: Callable[[], None] | None = None,
        ask_policy: Callable[[], None] | None = None,
    ) -> None: ...

class ClipPolicy:
    def __init__(
        self,
        kind: str,
        *,
        max_norm: float = ...,
        level: float = 0.0,
        decay: float = 0.0,
        factor: float = 1.0,
        warmup: int = 0,
        window: int = 0,
    ) -> None: ...
    @property
    def row_size(self) -> int: ...

class SpikePolicy:
    def __init__(self, *, sigma: float, window: int) -> None: ...
    @property
    def row_size(self) -> int: ...

class Telemetry:
    rows: Tensor
    recorded: Tensor
    history: int
    per_tensor: bool
    def __init__(
        self, *, rows: Tensor, recorded: Tensor, history: int, per_tensor: bool
    ) -> None: ...

class Scaling:
    unscale: float
    found_inf: bool
    grad_scale_tensor: Tensor | None
    found_inf_tensor: Tensor | None
    def __init__(
        self,
        *,
        unscale: float = 1.0,
        found_inf: bool = False,
        grad_scale_tensor: Tensor | None = None,
        found_inf_tensor: Tensor | None = None,
    ) -> None: ...

class DeviceMemory:
    def __init__(
        self,
        *,
        outcome: Tensor,
        taken: Tensor,
        counts: Tensor | None = None,
        nonfinite: Tensor | None = None,
        rounded_steps: Tensor | None = None,
        allocate: Allocate,
    ) -> None: ...

class Slot:
    first: bool
    def __init__(
        self, *, states: list[Tensor], numbers: list[Tensor], extra: Tensor | None, first: bool
    ) -> None: ...

class Outcome:
    def __init__(self, record: Tensor) -> None: ...
    @property
    def norm(self) -> float: ...
    @property
    def nonfinite(self) -> int: ...
    @property
    def refused(self) -> bool: ...
    @property
    def skipped(self) -> bool: ...
    @property
    def spiked(self) -> bool: ...
    @property
    def clipped(self) -> bool: ...

def check_param_groups(
    rule: str,
    param_groups: list[dict[str, Any]],
    defaults: dict[str, float | None],
    clips_units: bool,
    device: torch.device | None,
) -> None: ...
def count_steps(param_groups: list[dict[str, Any]], counter: str, steps: int) -> None: ...
def state_names(rule: str, group: Mapping[str, Any]) -> list[str]: ...
def state_numbers(rule: str) -> list[str]: ...

class Plan:
    def __init__(
        self,
        rule: str,
        fused: bool,
        param_groups: list[dict[str, Any]],
        slots: Sequence[Slot | None],
        options: dict[str, object],
        defaults: dict[str, float | None],
        device: torch.device | None,
    ) -> None: ...
    def seal(self, state: dict[Tensor, dict[str, Any]]) -> None: ...
    def matches(
        self, param_groups: list[dict[str, Any]], state: dict[Tensor, dict[str, Any]]
    ) -> bool: ...
    def step(
        self,
        param_groups: list[dict[str, Any]],
        state: dict[Tensor, dict[str, Any]],
        scaling: Scaling | None = None,
        grads: list[Tensor | None] | None = None,
        reduction: Reduction | None = None,
        clip_rows: Tensor | None = None,
        skip_row: Tensor | None = None,
        telemetry: Telemetry | None = None,
        skips_nonfinite: bool = False,
        creates_state: bool = False,
        memory: DeviceMemory | None = None,
    ) -> bool: ...
    @property
    def captured(self) -> bool: ...
    @property
    def outcome(self) -> Outcome: ...
    def nonfinite(self) -> list[int]: ...
    def active(self) -> list[Tensor]: ...
    def active_indices(self) -> list[int]: ...

def batch_norm_layout(input: Tensor) -> int: ...
def batch_norm_statistics(input: Tensor, statistics: Tensor, allocate: Allocate) -> None: ...
def batch_norm_forward(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    ceiling: float | None,
    output: Tensor,
    mask: Tensor | None,
    statistics: Tensor,
    allocate: Allocate,
) -> None: ...
def batch_norm_normalize(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    ceiling: float | None,
    output: Tensor,
    mask: Tensor | None,
) -> None: ...
def batch_norm_combine(
    parts: Tensor,
    statistics: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
) -> None: ...
def batch_norm_backward(
    grad_output: Tensor,
    input: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    ceiling: float | None,
    grad_input: Tensor | None,
    grad_residual: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    allocate: Allocate,
) -> None: ...
def batch_norm_backward_sums(
    grad_output: Tensor,
    input: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    eps: float,
    ceiling: float | None,
    sums: Tensor,
    allocate: Allocate,
) -> None: ...
def batch_norm_backward_input(
    grad_output: Tensor,
    input: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    sums: Tensor,
    eps: float,
    ceiling: float | None,
    grad_input: Tensor | None,
    grad_residual: Tensor | None,
) -> None: ...
