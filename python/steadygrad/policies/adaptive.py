"""Clips each output unit by the norm of its parameters."""

from __future__ import annotations

from dataclasses import dataclass

from steadygrad import _kernels
from steadygrad.policies.clip_policy import KernelClipPolicy

# A key of every param group: the group's own ``clipping``, or None if its units are not clipped.
CLIPPING = _kernels.CLIPPING


@dataclass(frozen=True)
class ClipAdaptive(KernelClipPolicy):
    r"""Clips the gradient of each output unit relative to the norm of the unit's parameters (AGC).

    A unit is one index of a parameter's first dimension, such as a row of a matrix or a filter of a convolution. A
    vector or a scalar is one unit. With 2-norms over the unit's elements, whatever ``norm_type`` is, a gradient
    :math:`g` whose norm exceeds its limit becomes

    .. math:: g \leftarrow \text{clipping} \cdot \max(\lVert w \rVert, \text{eps}) \, \frac{g}{\lVert g \rVert}

    Source: Brock et al. 2021, "High-performance large-scale image recognition without normalization", section 4.1.
    ``clipping`` is the paper's lambda, optax's ``clipping`` and the ``clip_factor`` of timm's ``adaptive_clip_grad``.
    The default is the paper's value for large batches; small batches allow a larger one.

    **The paper does not clip the final layer.** Every param group has a key ``clipping``, a number of its own or None
    to leave the group out.

    Examples:
        >>> opt = sg.optim.SGD(
        ...     [{"params": model.body.parameters()}, {"params": model.head.parameters(), "clipping": None}],
        ...     lr=0.1,
        ...     clip=sg.ClipAdaptive(),
        ... )

    The gradient that is compared is the one that ``max_norm`` would limit: unscaled, and with a penalty that comes
    before the clip. If a param group also has a ``max_norm``, it still limits the norm of the step's scope, and the
    smaller of the two coefficients applies. ``grad_norm`` is the total norm, as always. A step counts in
    ``clipped_steps`` if any unit was clipped. The policy reads gradients and parameters once more, and has no state. In
    telemetry ``limit`` is NaN, since there is no single limit, and ``clipped_norm`` is NaN for steps in which a unit or
    the norm was clipped.

    Sparse and complex gradients have no units. Their parameters have to be in a group whose ``clipping`` is None.

    If a parameter is a DTensor, every rank has to hold whole units of it: a replica, or ``Shard(0)`` of a parameter of
    two or more dimensions.

    Args:
        clipping: The largest allowed ratio of the norms, more than 0. Default: 0.01.
        eps: The least norm that a unit's parameters count with, at least 0, so that units of zeros can grow. Default:
            1e-3.

    Raises:
        TypeError: An argument is not a number.
        ValueError: An argument is out of range.
    """

    clipping: float = 0.01
    eps: float = 1e-3

    def __post_init__(self) -> None:
        """Checks the numbers."""
        self._positive("clipping")
        self._number("eps")

    @property
    def for_kernels(self) -> _kernels.ClipPolicy:
        """Returns the policy's name and eps; ``clipping`` is not part of it, since each param group has its own."""
        return _kernels.ClipPolicy("adaptive", level=float(self.eps))
