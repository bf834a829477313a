"""Blocks whose forward is known: torchvision's, timm's, and those that users register."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import textwrap
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from steadygrad.nn.fusion import Forward, Steps, any_global_hook, is_plain, norm_act


def _classified(model: Any, pooled: Tensor) -> Any:
    return model.fc(torch.flatten(pooled, 1))


def _residual(body: str, last: str) -> Steps:
    return Steps(body, add=True, shortcut="downsample?", last=last, in_place=True)


def _inverted(body: str) -> Steps:
    return Steps(body, add="has_skip", before_add="drop_path")


_LAYERS = "maxpool layer1 layer2 layer3 layer4"
_TIMM = "timm.models._efficientnet_blocks"

# For the full name of a method: the digest of its known source (see `source_digest`), and what that source does. A
# method of that name with another source, from an older or newer version, is not fused.
_KNOWN: dict[str, tuple[str, Forward]] = {
    "torchvision.models.resnet.BasicBlock.forward": (
        "3dc6cc10fd1c",
        _residual("conv1 bn1 relu conv2 bn2", "relu"),
    ),
    "torchvision.models.resnet.Bottleneck.forward": (
        "afb5737210b6",
        _residual("conv1 bn1 relu conv2 bn2 relu conv3 bn3", "relu"),
    ),
    "torchvision.models.resnet.ResNet._forward_impl": (
        "785290f02817",
        Steps(f"conv1 bn1 relu {_LAYERS} avgpool", end=_classified),
    ),
    "torchvision.models.mobilenetv2.InvertedResidual.forward": (
        "be2bdd39a506",
        Steps("conv", add="use_res_connect"),
    ),
    "torchvision.models.mobilenetv3.InvertedResidual.forward": (
        "3b1d2ab2b0fe",
        Steps("block", add="use_res_connect", in_place=True),
    ),
    "torchvision.models.mnasnet._InvertedResidual.forward": (
        "dcbe8ff8336a",
        Steps("layers", add="apply_residual"),
    ),
    "timm.models.resnet.BasicBlock.forward": (
        "30ffe319d2c4",
        _residual("conv1 bn1 drop_block act1 aa? conv2 bn2 se? drop_path?", "act2"),
    ),
    "timm.models.resnet.Bottleneck.forward": (
        "0d600af7f83c",
        _residual("conv1 bn1 act1 conv2 bn2 drop_block act2 aa? conv3 bn3 se? drop_path?", "act3"),
    ),
    "timm.models.resnet.ResNet.forward_features": (
        "fbf65d89acd2",
        Steps(f"conv1 bn1 act1 {_LAYERS}", unless="grad_checkpointing"),
    ),
    f"{_TIMM}.DepthwiseSeparableConv.forward": (
        "caedef4ea77a",
        _inverted("conv_s2d? bn_s2d? conv_dw bn1 aa se conv_pw bn2"),
    ),
    f"{_TIMM}.InvertedResidual.forward": (
        "b4c676d3bbaf",
        _inverted("conv_s2d? bn_s2d? conv_pw bn1 conv_dw bn2 aa se conv_pwl bn3"),
    ),
    f"{_TIMM}.EdgeResidual.forward": (
        "32048ec696a3",
        _inverted("conv_exp bn1 aa se conv_pwl bn2"),
    ),
    # This batch norm is a block of its own. timm's ConvNormAct and ConvBnAct contain it, and need no entry.
    "timm.layers.norm_act.BatchNormAct2d.forward": ("b1e6468008c6", norm_act),
}
_METHODS = ("forward", "_forward_impl", "forward_features")
_REGISTERED: dict[Any, Forward] = {}


def register_block(block: type[nn.Module], forward: Forward) -> None:
    """Tells `convert_batchnorm` what the forward of a class does, so that its batch norms are fused.

    ::

        register_block(Block, Steps("conv bn relu"))

        def forward(self, x):  # or a function, if names are not enough
            y = self.conv(x)
            return sg.nn.batch_norm_add_relu(self.bn, y, residual=x, relu=self.relu)

        register_block(Block, forward)

    It applies to models that are converted afterwards, and to subclasses that inherit the forward. At every call a
    block uses the forward of its class if a member has hooks or a forward of its own, if a member is None that may not
    be, or if there are global module hooks. A function reads the members at every call, as the class does.

    Args:
        block: The class.
        forward: :class:`~steadygrad.nn.Steps`, or a function with the arguments of the class's forward, ``self`` first.

    `convert_batchnorm` raises a ValueError if a block of the model lacks a member that its `Steps` name.

    Raises:
        TypeError: ``block`` is not a class of modules, or ``forward`` is not callable.
    """
    if not (isinstance(block, type) and issubclass(block, nn.Module)):
        raise TypeError(
            f"register_block: block: expected a subclass of torch.nn.Module, got {block!r}"
        )
    if not callable(forward):
        raise TypeError(
            f"register_block: forward: expected steadygrad.nn.Steps or a function, got {forward!r}"
        )
    _REGISTERED[block.forward] = forward


def registered_steps(kind: type[nn.Module]) -> Steps | None:
    """Returns the steps that were registered for a class; None if there are none, or if the class is a library's."""
    method, forward = known_forward(kind)
    if isinstance(forward, Steps) and getattr(kind, method) in _REGISTERED:
        return forward
    return None


def known_forward(kind: type[nn.Module]) -> tuple[str, Forward | None]:
    """Returns the name of a class's method whose source is known, and what that source does.

    If the source differs from the known one, it returns the method's full name and None; if there is no such method, an
    empty name and None.
    """
    changed = ""
    for method in _METHODS:
        function = getattr(kind, method, None)
        if not isinstance(function, FunctionType):
            continue
        if function in _REGISTERED:
            return method, _REGISTERED[function]
        name = f"{function.__module__}.{function.__qualname__}"
        if name in _KNOWN:
            digest, forward = _KNOWN[name]
            if source_digest(function) == digest:
                return method, forward
            changed = name
    return changed, None


@functools.cache
def source_digest(function: FunctionType) -> str:
    """Returns a digest of a function's arguments and statements, without layout, comments, annotations or docstring.

    The digest is empty if there is no source to read.
    """
    try:
        # The source is that of the code object, since a wrapper pretends to be the function that it wraps.
        source = inspect.getsource(function.__code__)
        (definition,) = ast.parse(textwrap.dedent(source)).body
    except (OSError, SyntaxError, ValueError):
        return ""
    if not isinstance(definition, ast.FunctionDef):
        return ""
    statements = definition.body[ast.get_docstring(definition) is not None :]
    names = ", ".join(argument.arg for argument in definition.args.args)
    text = "\n".join([names, *map(ast.unparse, statements)])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def stands(
    block: nn.Module, forward: Forward, args: tuple[Any, ...] = (None,), kwargs: Any = None
) -> bool:
    """Returns whether a known forward may replace that of the block's class, for these arguments and members."""
    if any_global_hook():
        return False
    if isinstance(forward, Steps):
        return len(args) == 1 and not kwargs and not forward.why_not(block)
    return all(child is not None and is_plain(child) for child in block._modules.values())
