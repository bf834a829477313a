"""The compiled kernels and the checks in front of them; called by the public functions only."""

from collections.abc import Callable

from torch import Tensor

Allocate = Callable[[int], Tensor]
NormTensors = tuple[Tensor, Tensor, Tensor] | None
# Rows of sums, which tensors this process counts, what combines the rows of all processes, and what asks a policy.
Reduction = (
    tuple[Tensor, Tensor, Callable[[], None] | None]
    | tuple[Tensor, Tensor, Callable[[], None] | None, Callable[[], None]]
    | None
)
PolicyRows = tuple[Tensor | None, Tensor | None] | None
TelemetryMemory = tuple[Tensor, Tensor, int, bool]
VERSION: str
GROUP_FIELDS: tuple[str, ...]

def launch_count() -> int: ...
def build_info() -> dict[str, object]: ...
def is_asynchronous(device_type: str) -> bool: ...
def grad_norm(
    tensors: list[Tensor],
    norm_type: float,
    output: NormTensors,
    allocate: Allocate,
    reduction: Reduction = None,
) -> tuple[float, int, bool]: ...
def clip_grad_norm_(
    grads: list[Tensor],
    max_norm: float,
    norm_type: float,
    error_if_nonfinite: bool,
    output: NormTensors,
    allocate: Allocate,
    reduction: Reduction = None,
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

class StepReport:
    @property
    def norm(self) -> float: ...
    @property
    def nonfinite_count(self) -> int: ...
    @property
    def nonfinite(self) -> list[int]: ...
    @property
    def refused(self) -> bool: ...
    @property
    def skipped(self) -> bool: ...
    @property
    def spiked(self) -> bool: ...
    @property
    def clipped(self) -> bool: ...

Slot = tuple[list[Tensor], list[Tensor], bool, Tensor | None]

class Plan:
    def __init__(
        self,
        rule: str,
        groups: list[list[Tensor]],
        slots: list[Slot | None],
        options: dict[str, object],
    ) -> None: ...
    def seal(self, state: dict[Tensor, dict[str, object]]) -> None: ...
    def matches(
        self, param_groups: list[dict[str, object]], state: dict[Tensor, dict[str, object]]
    ) -> bool: ...
    def step(
        self,
        groups: list[tuple[float, ...]],
        unscale: float,
        found_inf: bool,
        grads: list[Tensor | None] | None = None,
        rounded_steps: int = 0,
        reduction: Reduction = None,
        policy_rows: PolicyRows = None,
        telemetry: TelemetryMemory | None = None,
    ) -> StepReport | None: ...
    def step_on_device(
        self,
        groups: list[tuple[float, ...]],
        unscale: float,
        found_inf: bool,
        grads: list[Tensor | None] | None,
        memory: dict[str, Tensor | None],
        learning_rates: list[Tensor | None],
        allocate: Allocate,
        reduction: Reduction = None,
        policy_rows: PolicyRows = None,
        telemetry: TelemetryMemory | None = None,
    ) -> bool: ...
    @property
    def captured(self) -> bool: ...
    def active(self) -> list[Tensor]: ...
    def active_indices(self) -> list[int]: ...
    def mark_first_steps_done(self) -> None: ...

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
    relu: bool,
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
    relu: bool,
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
    relu: bool,
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
    relu: bool,
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
    relu: bool,
    grad_input: Tensor | None,
    grad_residual: Tensor | None,
) -> None: ...
