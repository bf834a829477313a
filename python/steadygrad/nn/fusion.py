"""Finds batch norms that are followed by an addition or a ReLU, and makes them one call in a module's graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import fx, nn

from steadygrad.nn.batch_norm import _BatchNorm as BatchNorm
from steadygrad.nn.fused_calls import (
    batch_norm_add_relu,
    ends_in_batch_norm,
    is_chain,
    is_plain_relu,
    is_unhooked,
)
from steadygrad.nn.tracing import IN_PLACE_OPERATORS, Conditions, NotTraceable, trace

RELU, ADD, ADD_RELU = "batch norm + ReLU", "batch norm + add", "batch norm + add + ReLU"

_RELU_FUNCTIONS = (F.relu, F.relu_, torch.relu, torch.relu_)
_IADD = IN_PLACE_OPERATORS["add"]
# Modules that change nothing but what they return, draw no numbers, and return a tensor of their own.
_FRESH = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
)

# By source and the ids of the globals, which the functions keep alive.
_FUNCTIONS: WeakValueDictionary[tuple[object, ...], Callable[..., Any]] = WeakValueDictionary()


@dataclass(frozen=True)
class Site:
    """One place in a forward where a batch norm takes on what follows it.

    Attributes:
        norm: name of the batch norm, or of the `nn.Sequential` that ends in it, within the module.
        operation: `RELU`, `ADD` or `ADD_RELU`.
    """

    norm: str
    operation: str


@dataclass
class Variant:
    """A module's forward in one mode, with the batch norms fused.

    Attributes:
        run: takes the module and its arguments.
        conditions: under which `run` stands for the forward.
        sites: what was fused, in the order of the forward.
        reasons: why not, by the name of the batch norm or of the `nn.Sequential` that ends in it.
    """

    run: Callable[..., Any]
    conditions: Conditions
    sites: list[Site]
    reasons: dict[str, str]


@dataclass
class Fusion:
    """What was found in a module's own forward.

    Attributes:
        training: the forward in training mode; None where nothing was fused.
        evaluation: the same in evaluation mode.
        problem: why there is no graph, where there is none.
    """

    training: Variant | None = None
    evaluation: Variant | None = None
    problem: str = ""

    @property
    def is_useful(self) -> bool:
        """Whether anything was fused in either mode."""
        return any(v is not None and v.sites for v in (self.training, self.evaluation))


def find_fusion(module: nn.Module, forward: object) -> Fusion:
    """Trace a module's own forward in both modes and fuse what can be; changes nothing."""
    if "forward" in vars(module):
        return Fusion(problem="its forward was replaced")
    if not isinstance(forward, FunctionType) or isinstance(module, fx.GraphModule):
        return Fusion(problem="its forward is no plain Python function")
    try:
        return Fusion(
            _fused(module, *trace(module, forward, training=True)),
            _fused(module, *trace(module, forward, training=False)),
        )
    except NotTraceable as error:
        return Fusion(problem=str(error))


def _fused(module: nn.Module, graph: fx.Graph, conditions: Conditions) -> Variant:
    matcher = _Matcher(module, graph)
    matcher.fuse()
    return Variant(_compiled(graph), conditions, matcher.sites, matcher.reasons)


def _compiled(graph: fx.Graph) -> Callable[..., Any]:
    """Equal blocks of a network share one function, so that torch.compile sees one."""
    code = graph.python_code("self")
    key = (code.src, *sorted((name, id(value)) for name, value in code.globals.items()))
    function = _FUNCTIONS.get(key)
    if function is None:
        names = dict(code.globals)
        exec(compile(code.src, "<fused forward>", "exec"), names)
        function = _FUNCTIONS[key] = names["forward"]
    return function


@dataclass
class _Matcher:
    module: nn.Module
    graph: fx.Graph
    sites: list[Site] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)

    def fuse(self) -> None:
        """Rewrite the graph."""
        order = {node: index for index, node in enumerate(self.graph.nodes)}
        self._order = order
        for node in list(self.graph.nodes):
            if _is_add(node):
                self._fuse_add(node)
        for node in list(self.graph.nodes):
            if self._norm(node) is not None:
                self._fuse_relu(node)

    def _norm(self, node: object) -> nn.Module | None:
        """The batch norm, or the chain that ends in one, that this node calls with one tensor."""
        if not isinstance(node, fx.Node) or node.op != "call_module":
            return None
        module = self._called(node)
        one = len(node.args) == 1 and isinstance(node.args[0], fx.Node) and not node.kwargs
        return module if one and ends_in_batch_norm(module) else None

    def _called(self, node: fx.Node) -> nn.Module:
        return self.module.get_submodule(str(node.target))

    def _fuse_add(self, add: fx.Node) -> None:
        left, right = (add.args[0], add.args[1]) if len(add.args) == 2 else (None, None)
        if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or left is right:
            for operand in (left, right):
                self._explain(operand, "what is added to it is no other tensor")
            return
        in_place = add.target in (_IADD, "add_")
        # A batch norm itself before a chain that ends in one: less work changes its place.
        pairs = sorted(
            ((left, right), (right, left)), key=lambda pair: _is_chain_call(self, pair[0])
        )
        for norm, residual in pairs:
            if self._norm(norm) is None:
                continue
            why = self._why_not_add(norm, add)
            if in_place and norm is not left:
                why = "it is added in place to another tensor"
            if why:
                self._explain(norm, why)
                continue
            self._explain(residual, "it is what another batch norm adds")
            self._replace(norm, residual, add, in_place)
            return

    def _why_not_add(self, norm: fx.Node, add: fx.Node) -> str:
        if len(norm.users) != 1:
            return _used_often(norm)
        between = [n for n in self._order if self._order[norm] < self._order[n] < self._order[add]]
        moved = set(self._called(norm).modules())
        for node in between:
            if node.op == "call_module" and moved.intersection(self._called(node).modules()):
                return "it is called again before the addition"
        if not between or (self._norm_is_pure(norm) and all(map(self._is_pure, between))):
            return ""
        source = norm.args[0]
        if (
            isinstance(source, fx.Node)
            and isinstance(self._called(norm), BatchNorm)
            and source.op == "call_module"
            and type(self._called(source)) in _FRESH
            and len(source.users) == 1
        ):
            return ""
        return "what runs before the addition might change its input"

    def _norm_is_pure(self, norm: fx.Node) -> bool:
        return _is_pure_module(self._called(norm))

    def _is_pure(self, node: fx.Node) -> bool:
        if node.op in ("get_attr", "placeholder"):
            return True
        if node.op == "call_module":
            return _is_pure_module(self._called(node))
        if node.op == "call_function":
            module = getattr(node.target, "__module__", None)
            return module in ("_operator", "math") and not node.kwargs
        return False

    def _fuse_relu(self, norm: fx.Node) -> None:
        if str(norm.target) in self.reasons:
            return
        users = list(norm.users)
        if len(users) != 1:
            self._explain(norm, _used_often(norm))
        elif users[0].op == "output":
            self._explain(norm, "its output leaves the module")
        elif self._is_relu(users[0], norm):
            self._replace(norm, None, users[0], False)
        else:
            self._explain(norm, f"it is followed by {self._described(users[0])}")

    def _is_relu(self, node: fx.Node, norm: fx.Node) -> bool:
        if node.all_input_nodes != [norm]:
            return False
        if node.op == "call_module":
            return is_plain_relu(self._called(node))
        if node.op == "call_method":
            return node.target in ("relu", "relu_")
        return node.op == "call_function" and node.target in _RELU_FUNCTIONS and _no_out(node)

    def _replace(
        self, norm: fx.Node, residual: fx.Node | None, last: fx.Node, in_place: bool
    ) -> None:
        """Put one call in the place of `last`, or of the ReLU after it."""
        relu = last if residual is None else None
        if residual is not None and len(last.users) == 1:
            (user,) = last.users
            relu = user if self._is_relu(user, last) else None
        # Alone with a ReLU a batch norm stays in its place; with a residual it waits for that.
        with self.graph.inserting_before(norm if residual is None else last):
            module = self.graph.get_attr(str(norm.target))
            called: Any = relu is not None
            if relu is not None and relu.op == "call_module":
                called = self.graph.get_attr(str(relu.target))
            args = (module, norm.args[0], residual, in_place, called)
            fused = self.graph.call_function(batch_norm_add_relu, args)
        self._order[fused] = self._order[norm if residual is None else last]
        end = last if relu is None else relu
        end.replace_all_uses_with(fused)
        for node in dict.fromkeys((end, last, norm)):
            self.graph.erase_node(node)
            del self._order[node]
        operation = RELU if residual is None else ADD if relu is None else ADD_RELU
        self.sites.append(Site(str(norm.target), operation))
        self.reasons.pop(str(norm.target), None)

    def _explain(self, node: object, why: str) -> None:
        if isinstance(node, fx.Node) and self._norm(node) is not None:
            self.reasons.setdefault(str(node.target), why)

    def _described(self, node: fx.Node) -> str:
        if node.op != "call_module":
            return str(getattr(node.target, "__name__", node.target))
        module = self._called(node)
        hooks = "" if is_unhooked(module) else " with hooks"
        return f"{type(module).__name__}{hooks}"


def _is_chain_call(matcher: _Matcher, node: fx.Node) -> bool:
    return node.op == "call_module" and not isinstance(matcher._called(node), BatchNorm)


def _is_add(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in ("add", "add_") and not node.kwargs
    if node.op != "call_function":
        return False
    return node.target in (operator.add, _IADD, torch.add) and not node.kwargs


def _no_out(node: fx.Node) -> bool:
    return "out" not in node.kwargs


def _used_often(norm: fx.Node) -> str:
    return f"its output is used {len(norm.users)} times" if norm.users else "its output is not used"


def _is_pure_module(module: nn.Module) -> bool:
    leaves = list(_leaves(module))
    return all(
        is_unhooked(leaf)
        and (
            type(leaf) in _FRESH
            or isinstance(leaf, (BatchNorm, nn.Identity))
            or (type(leaf) is nn.ReLU and not leaf.inplace)
        )
        for leaf in leaves
    )


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    if is_chain(module) and is_unhooked(module):
        for child in module.children():
            yield from _leaves(child)
    else:
        yield module
