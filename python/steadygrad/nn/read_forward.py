"""Reads the source of a block's forward, to suggest the `Steps` that say the same.

Only suggestions are made of it: nothing is fused because of what is read here.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F

from steadygrad.nn.fusion import Steps

_MEMBER = "self."
# Other functions than members are known by their names, and these are the only ones.
FUNCTIONS: dict[str, Any] = {"torch.relu": torch.relu} | {
    f"{module}{function.__name__}": function
    for module in ("", "F.", "nn.functional.", "torch.nn.functional.")
    for function in (F.relu, F.relu6)
}


@dataclass(frozen=True)
class Read:
    """Describes a forward that calls one layer after the other, and may add something to the result once.

    Every name is that of a call, ``self.conv`` or ``F.relu``, with a question mark if the member may be None.

    Attributes:
        body: The calls before the addition.
        shortcut: The calls that the input goes through before it is added; None if nothing is added.
        after: The calls after the addition.
        in_place: Whether the addition is written ``y += x``.
        only_if: Name of the block's attribute that says whether there is an addition; empty if there always is.
    """

    body: tuple[str, ...] = ()
    shortcut: tuple[str, ...] | None = None
    after: tuple[str, ...] = ()
    in_place: bool = False
    only_if: str = ""

    def called(self, name: str) -> Read:
        """Returns this, with one more call."""
        if self.shortcut is None:
            return replace(self, body=(*self.body, name))
        return replace(self, after=(*self.after, name))

    @property
    def names(self) -> tuple[str, ...]:
        """Returns the names of all calls."""
        return (*self.body, *(self.shortcut or ()), *self.after)

    @property
    def steps(self) -> Steps | None:
        """Returns the same as `Steps`; None if some call is not that of a member, or several follow the addition."""
        if len(self.after) > 1 or not all(name.startswith(_MEMBER) for name in self.names):
            return None
        body, shortcut, after = (
            " ".join(name.removeprefix(_MEMBER) for name in names)
            for names in (self.body, self.shortcut or (), self.after)
        )
        adds = self.only_if or self.shortcut is not None
        return Steps(body, adds, shortcut=shortcut, last=after, in_place=self.in_place)

    def following(self, name: str) -> tuple[bool, str]:
        """Returns whether an addition follows a call of the body, and the call after it, or after that addition."""
        if name not in self.body:
            return False, ""
        at = self.body.index(name) + 1
        adds = at == len(self.body) and self.shortcut is not None
        after = self.after if adds else self.body[at:]
        return adds, after[0] if after else ""


def read_forward(function: Any) -> Read | None:
    """Reads a forward; returns None if it does anything else than `Read` can describe, or has no source."""
    if not isinstance(function, FunctionType):
        return None
    try:
        source = inspect.getsource(function.__code__)
        (definition,) = ast.parse(textwrap.dedent(source)).body
        assert isinstance(definition, ast.FunctionDef)
        given = definition.args
        assert not (given.kwonlyargs or given.vararg or given.kwarg or given.posonlyargs)
        block, input = (argument.arg for argument in given.args)
        assert block == "self"
        return _Reader(input).read(definition.body)
    except (AssertionError, KeyError, OSError, SyntaxError, ValueError):
        return None


class _Reader:
    """Follows the values of a forward's variables; raises AssertionError, KeyError or ValueError at what is unknown."""

    def __init__(self, input: str) -> None:
        self.values = {input: Read()}
        self.calls = 0

    def read(self, statements: list[ast.stmt]) -> Read:
        for at, statement in enumerate(statements):
            if isinstance(statement, ast.Return):
                result = self.value(_returned(statements[at:]))
            elif isinstance(statement, ast.If) and isinstance(statement.body[0], ast.Return):
                yes, no = statement.body, statement.orelse + statements[at + 1 :]
                result = self.value(ast.IfExp(statement.test, _returned(yes), _returned(no)))
            else:
                self.execute(statement)
                continue
            # A call whose result is used twice, or not at all, has no place in a chain.
            assert len(result.names) == self.calls
            return result
        raise ValueError("no return")

    def execute(self, statement: ast.stmt) -> None:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            return
        if isinstance(statement, ast.AugAssign):
            assert isinstance(statement.op, ast.Add) and isinstance(statement.target, ast.Name)
            target, other = self.values[statement.target.id], self.value(statement.value)
            assert target.body == _sum(target, other).body
            total = replace(_sum(target, other), in_place=True)
            # Other variables may hold the tensor that the addition changes.
            self.values = {k: total if v is target else v for k, v in self.values.items()}
        elif isinstance(statement, ast.If) and isinstance(statement.test, ast.Attribute):
            self.execute_if_attribute(statement)
        elif isinstance(statement, ast.If):
            self.execute_optional(statement)
        else:
            assert isinstance(statement, (ast.Assign, ast.AnnAssign))
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            (target_name,) = targets
            assert isinstance(target_name, ast.Name) and statement.value is not None
            self.values[target_name.id] = self.value(statement.value)

    def execute_optional(self, statement: ast.If) -> None:
        """Reads ``if self.member is not None: x = self.member(y)``, where x is y otherwise."""
        (assignment,) = statement.body
        assert isinstance(assignment, ast.Assign) and not statement.orelse
        (target,), call = assignment.targets, assignment.value
        assert isinstance(target, ast.Name) and isinstance(call, ast.Call)
        member = ast.unparse(call.func)
        assert member.startswith(_MEMBER)
        assert ast.unparse(statement.test) == f"{member} is not None"
        (argument,) = call.args
        before = self.value(argument)
        assert not call.keywords and self.values.get(target.id, before) == before
        self.calls += 1
        self.values[target.id] = before.called(f"{member}?")

    def execute_if_attribute(self, statement: ast.If) -> None:
        """Reads ``if self.attribute: y = y + x``."""
        (inner,) = statement.body
        before, calls = self.values.copy(), self.calls
        self.execute(inner)
        assert not statement.orelse and self.calls == calls
        for name, value in self.values.items():
            if value is not before[name]:
                self.values[name] = _sum_if(statement.test, value, before[name])

    def value(self, expression: ast.expr) -> Read:
        if isinstance(expression, ast.Name):
            return self.values[expression.id]
        if isinstance(expression, ast.IfExp):
            yes, calls = self.value(expression.body), self.calls
            no, self.calls = self.value(expression.orelse), calls
            return _sum_if(expression.test, yes, no)
        if isinstance(expression, ast.BinOp):
            assert isinstance(expression.op, ast.Add)
            return _sum(self.value(expression.left), self.value(expression.right))
        assert isinstance(expression, ast.Call)
        name = ast.unparse(expression.func)
        if name.startswith(_MEMBER):
            assert not expression.keywords and name.count(".") == 1
        else:
            assert name in FUNCTIONS
        (argument,) = expression.args
        value = self.value(argument)
        self.calls += 1
        return value.called(name)


def _sum(left: Read, right: Read) -> Read:
    assert left.shortcut is None and right.shortcut is None
    body, shortcut = (left, right) if len(left.body) >= len(right.body) else (right, left)
    return Read(body.body, shortcut.body)


def _sum_if(test: ast.expr, yes: Read, no: Read) -> Read:
    name = ast.unparse(test)
    assert name.startswith(_MEMBER) and isinstance(test, ast.Attribute)
    # The shortcut must have no calls, since they would not be made without the addition.
    assert yes.shortcut == () and no == Read(yes.body) and not yes.after and not yes.only_if
    return replace(yes, only_if=name.removeprefix(_MEMBER))


def _returned(statements: list[ast.stmt]) -> ast.expr:
    (statement,) = statements
    assert isinstance(statement, ast.Return) and statement.value is not None
    return statement.value
