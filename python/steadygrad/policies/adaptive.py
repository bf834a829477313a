"""Clipping by output unit."""

from __future__ import annotations

from dataclasses import dataclass

from steadygrad import _kernels
from steadygrad.policies.clip_policy import KernelClipPolicy

# Key of every param group: its own ``clipping``, or None where units are not clipped.
CLIPPING = _kernels.CLIPPING


@dataclass(frozen=True)
class ClipAdaptive(KernelClipPolicy):
    r"""AGC: the gradient of each output unit is limited relative to the norm of the unit's parameters.

    A unit is a row of a matrix or a filter of a convolution, in general one index of the first dimension of a parameter
    of two or more; a vector or scalar is one unit. With 2-norms over the unit's elements, whatever ``norm_type`` is,
    where :math:`\lVert g \rVert` is larger than its limit

    .. math:: g \leftarrow \text{clipping} \cdot \max(\lVert w \rVert, \text{eps}) \, \frac{g}{\lVert g \rVert}

    Source: Brock et al. 2021, "High-performance large-scale image recognition without normalization", section 4.1,
    whose lambda is ``clipping``, as in optax; ``clip_factor`` of timm's ``adaptive_clip_grad``. The default is that of
    large batches; small ones bear more.

    **The final layer is not clipped** in the paper. Every param group has a key ``clipping``: its own number, or None
    to leave it out:

    >>> opt = sg.optim.SGD(
    ...     [{"params": model.body.parameters()}, {"params": model.head.parameters(), "clipping": None}],
    ...     lr=0.1,
    ...     clip=sg.ClipAdaptive(),
    ... )

    The gradient is the one that ``max_norm`` would see: unscaled, with a penalty that comes before the clip. The key
    ``max_norm`` of a param group still limits the norm of the step's scope; the smaller coefficient of both holds.
    ``grad_norm`` is the total norm as ever, and a step counts in ``clipped_steps`` if any unit was clipped. It takes
    one more read of gradients and parameters, and learns nothing. In telemetry ``limit`` is NaN, as there is no single
    one, and ``clipped_norm`` is NaN for steps in which a unit or the norm was clipped.

    Sparse gradients and complex ones have no units: their parameters belong into a group whose ``clipping`` is None.

    Of a DTensor every rank has to hold whole units: replicas, or for two and more dimensions ``Shard(0)``.

    Args:
        clipping: lambda, more than 0. Default: 0.01.
        eps: the least norm that a unit's parameters count with, at least 0, so that units of zeros can grow. Default:
            1e-3.

    Raises:
        TypeError: an argument is no number.
        ValueError: an argument is out of range.
    """

    clipping: float = 0.01
    eps: float = 1e-3

    def __post_init__(self) -> None:
        """Checks the numbers."""
        self._positive("clipping")
        self._number("eps")

    @property
    def for_kernels(self) -> _kernels.ClipPolicy:
        """Its name and eps; ``clipping`` is a number of each param group."""
        return _kernels.ClipPolicy("adaptive", level=float(self.eps))
