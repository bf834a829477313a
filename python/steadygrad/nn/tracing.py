"""The graph of one module's own forward, with what must still hold when the graph runs in its place.

torch.fx follows one path through a forward and forgets why it took it. A graph is used here only where that
does no harm: everything that led to the path is either checked again before each run (`Conditions.hold`), or is
a reason to keep away from the module (`NotTraceable`).
"""

from __future__ import annotations

import builtins
import inspect
import operator
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType, FrameType, FunctionType, MethodType, ModuleType, new_class
from typing import Any

import torch
from torch import Tensor, fx, nn

Path = tuple[str, ...]

_ABSENT = object()
_NUMBERS = (bool, int, float, str, bytes, complex, type(None), torch.dtype, torch.device)
_FUNCTIONS = (FunctionType, MethodType, type(len), type, ModuleType)
# What every module has; of these only `training` may be asked for.
_BOOKKEEPING = frozenset(vars(nn.Module())) - {"training"}

# Python calls into these mean that something acts on the operations within, which a graph does not keep.
_AMBIENT = (
    "torch.amp.autocast_mode",
    "torch.autograd.function",
    "torch.autograd.grad_mode",
    "torch.autograd.graph",
    "torch.autograd.profiler",
    "torch.random",
    "torch.utils._contextlib",
    "torch.utils.checkpoint",
)
# These would be answered while tracing, for a stand-in instead of a tensor, or for another time.
_QUESTIONS = frozenset(
    getattr(owner, name)
    for owner, names in (
        (builtins, ("isinstance", "issubclass", "hasattr", "callable", "id", "print")),
        (
            torch,
            (
                "is_grad_enabled",
                "is_inference_mode_enabled",
                "is_autocast_enabled",
                "is_autocast_cpu_enabled",
                "get_autocast_dtype",
                "get_default_dtype",
            ),
        ),
    )
    for name in names
    if hasattr(owner, name)
)
_QUESTION_NAMES = frozenset(("type", "is_tensor", "is_compiling", "_is_tracing", "__class__"))
_NOT_USERS = frozenset(("torch",)) | (sys.stdlib_module_names - {"__main__"})

IN_PLACE = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")


def _in_place_operator(name: str) -> Callable[[Any, Any], Any]:
    function = getattr(operator, f"i{name}")

    def in_place(left: Any, right: Any) -> Any:
        return function(left, right)

    in_place.__name__ = f"i{name}"
    return in_place


# torch.fx would turn `x += y` into `x = x + y`, which other names of x notice.
IN_PLACE_OPERATORS = {name: _in_place_operator(name) for name in IN_PLACE}


class NotTraceable(Exception):
    """Why no graph can stand for a module's forward."""


class _Operand(fx.Proxy):
    """A stand-in for a tensor that keeps in-place operators what they are."""


def _recording(function: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name, _function in IN_PLACE_OPERATORS.items():
    setattr(_Operand, f"__i{_name}__", _recording(_function))


class _OwnForward(fx.Tracer):
    """Traces one forward; every module that it calls stays a call, with its hooks."""

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Operand(node, self)


@dataclass
class Conditions:
    """What a graph was found under.

    Attributes:
        inputs: how many arguments the forward has that have no default.
        reads: attributes that the forward read while it was traced: path of the module, name, value.
        lengths: how many children each module on the way to a called one had.
    """

    inputs: int
    reads: list[tuple[Path, str, object]] = field(default_factory=list)
    lengths: list[tuple[Path, int]] = field(default_factory=list)

    def hold(self, module: nn.Module, args: tuple[object, ...]) -> bool:
        """Whether the forward would take the traced path with these arguments."""
        if len(args) != self.inputs:
            return False
        for arg in args:
            if not isinstance(arg, Tensor):
                return False
        for path, length in self.lengths:
            found = _descendant(module, path)
            if found is None or len(found._modules) != length:
                return False
        for path, name, value in self.reads:
            found = _descendant(module, path)
            if found is None or getattr(found, name, _ABSENT) != value:
                return False
        return True


def _descendant(module: nn.Module, path: Path) -> nn.Module | None:
    found: nn.Module | None = module
    for name in path:
        if found is None:
            return None
        found = found._modules.get(name)
    return found


def trace(module: nn.Module, forward: FunctionType, training: bool) -> tuple[fx.Graph, Conditions]:
    """The graph of `forward`, run as the forward of `module`, in training or evaluation mode.

    The graph calls submodules and functions; its inputs are the arguments without a default. The module is as
    before when this returns or raises.

    Raises:
        NotTraceable: the forward's path depends on its input or on what cannot be watched, or it has other
            effects than those on tensors.
    """
    names = _required_arguments(forward)
    reads: dict[tuple[Path, str], object] = {}
    problems: list[str] = []
    classes = {child: type(child) for child in module.modules()}
    mode = module.training
    before = (torch.get_rng_state(), random.getstate())
    try:
        object.__setattr__(module, "training", training)
        for name, child in list(module.named_modules()):
            path = tuple(name.split(".")) if name else ()
            own = _with_arguments(forward, names) if not name else None
            watched = _watched(type(child), path, reads, problems, own)
            object.__setattr__(child, "__class__", watched)
        tracer = _OwnForward()
        with _watching_calls(problems):
            graph = tracer.trace(module)
    except NotTraceable:
        raise
    except Exception as error:
        raise NotTraceable(problems[0] if problems else _first_line(error)) from error
    finally:
        for child, kind in classes.items():
            if type(child) is not kind:
                object.__setattr__(child, "__class__", kind)
        object.__setattr__(module, "training", mode)
        random_again = (torch.get_rng_state(), random.getstate())
        torch.set_rng_state(before[0])
        random.setstate(before[1])
    if not torch.equal(before[0], random_again[0]) or before[1] != random_again[1]:
        problems.append("it draws random numbers")
    if problems:
        raise NotTraceable(problems[0])
    kept = [
        (path, name, value)
        for (path, name), value in reads.items()
        if (path, name) != ((), "training")
    ]
    return graph, Conditions(len(names), kept, _lengths(module, graph))


def _required_arguments(forward: FunctionType) -> list[str]:
    names = []
    for name, parameter in list(inspect.signature(forward).parameters.items())[1:]:
        if parameter.kind is parameter.VAR_POSITIONAL or parameter.kind is parameter.KEYWORD_ONLY:
            if parameter.default is parameter.empty:
                raise NotTraceable(f"it takes {parameter}")
        elif parameter.kind is parameter.VAR_KEYWORD:
            raise NotTraceable(f"it takes {parameter}")
        elif parameter.default is parameter.empty:
            names.append(name)
    return names


def _with_arguments(forward: FunctionType, names: list[str]) -> Any:
    listed = ", ".join(["self", *names])
    return eval(f"lambda {listed}: __forward__({listed})", {"__forward__": forward})


def _watched(
    kind: type[nn.Module],
    path: Path,
    reads: dict[tuple[Path, str], object],
    problems: list[str],
    forward: Any,
) -> type[nn.Module]:
    """A subclass that notes which attributes are read, and refuses to have any set."""
    where = ".".join(("self", *path))

    def get(self: nn.Module, name: str) -> Any:
        value = kind.__getattribute__(self, name)
        if name in _BOOKKEEPING or name.startswith("__") or isinstance(value, nn.Module):
            return value
        static = inspect.getattr_static(kind, name, None)
        if isinstance(static, (FunctionType, property, classmethod, staticmethod)):
            return value
        if isinstance(value, fx.Proxy):
            return value
        if not _can_be_watched(value):
            problems.append(f"it reads {where}.{name}, a {type(value).__name__}")
        reads[path, name] = value
        return value

    def refuse(self: nn.Module, name: str, *_: Any) -> None:
        problems.append(f"it sets {where}.{name}")
        raise NotTraceable(problems[0])

    namespace: dict[str, Any] = {
        "__getattribute__": get,
        "__setattr__": refuse,
        "__delattr__": refuse,
        "__module__": kind.__module__,
    }
    if forward is not None:
        namespace["forward"] = forward
    watched = new_class(kind.__name__, (kind,), exec_body=lambda body: body.update(namespace))
    return watched


def _can_be_watched(value: object) -> bool:
    if isinstance(value, tuple):
        return all(_can_be_watched(element) for element in value)
    return isinstance(value, (*_NUMBERS, *_FUNCTIONS))


@contextmanager
def _watching_calls(problems: list[str]) -> Iterator[None]:
    seen: set[CodeType] = set()

    def watch(frame: FrameType, event: str, arg: Any) -> None:
        name = str(frame.f_globals.get("__name__", ""))
        if event == "call":
            if name in _AMBIENT:
                problems.append(f"it uses {name}")
            elif frame.f_code not in seen and _is_users(name):
                seen.add(frame.f_code)
                for asked in _QUESTION_NAMES.intersection(frame.f_code.co_names):
                    problems.append(f"it asks for {asked}")
        elif event == "c_call" and _is_question(arg) and _is_users(name):
            problems.append(f"it calls {arg.__name__}")

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        yield
    finally:
        sys.setprofile(before)


def _is_users(module_name: str) -> bool:
    return module_name != __name__ and module_name.partition(".")[0] not in _NOT_USERS


def _is_question(function: object) -> bool:
    try:
        return function in _QUESTIONS
    except TypeError:  # a method of something that has no hash
        return False


def _lengths(module: nn.Module, graph: fx.Graph) -> list[tuple[Path, int]]:
    paths: dict[Path, None] = {(): None}
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            parts = tuple(str(node.target).split("."))
            paths.update(dict.fromkeys(parts[:end] for end in range(1, len(parts))))
    found = ((path, _descendant(module, path)) for path in paths)
    return [(path, len(child._modules)) for path, child in found if child is not None]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
