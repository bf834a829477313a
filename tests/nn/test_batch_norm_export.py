"""Exported programs, ONNX files and traces hold only torch's operations, so that they run without this package."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import steadygrad as sg
from steadygrad.nn import known_blocks


class Block(nn.Module):
    """Everything that is fused: with ReLU, with a residual, with an activation of its own; and a penalty."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.own = sg.nn.BatchNorm2d(4, activation="relu")
        self.penalty = sg.nn.ActivationPenalty(0.1, 0.1)

    def forward(self, input: Tensor) -> Tensor:
        made = self.relu(self.norm(self.first(input)))
        made = self.relu(self.last(self.second(made)) + made)
        output: Tensor = self.penalty(self.own(made))
        return output


def fused(self: Block, input: Tensor) -> Tensor:
    """Compute the same with fused operations."""
    made = sg.nn.batch_norm_add_relu(self.norm, self.first(input), relu=self.relu)
    made = sg.nn.batch_norm_add_relu(self.last, self.second(made), made, self.relu)
    output: Tensor = self.penalty(self.own(made))
    return output


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_blocks, "_REGISTERED", {})
    sg.nn.register_block(Block, fused)


def converted() -> nn.Module:
    torch.manual_seed(0)
    model = sg.nn.convert_batchnorm(Block())
    assert type(model).__name__ == "FusedBlock"
    for _ in range(2):
        model(image())
    return model.eval()


def image() -> Tensor:
    return torch.linspace(-2, 3, 2 * 3 * 8 * 8).sin().view(2, 3, 8, 8)


def operations(program: torch.export.ExportedProgram) -> set[str]:
    """Return the namespaces of the operators that a program calls."""
    calls = [
        str(node.target)
        for module in program.graph_module.modules()
        if isinstance(module, torch.fx.GraphModule)
        for node in module.graph.nodes
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)
    ]
    assert "aten.batch_norm.default" in calls
    return {call.partition(".")[0] for call in calls}


@pytest.mark.parametrize(("training", "strict"), [(False, False), (True, False), (False, True)])
def test_exported_programs_hold_torchs_operators_alone(training: bool, strict: bool) -> None:
    model = converted().train(training)
    twin = copy.deepcopy(model)
    program = torch.export.export(model, (image(),), strict=strict)
    assert operations(program) == {"aten"}
    torch.testing.assert_close(program.module()(image()), twin(image()))


def test_an_exported_file_runs_without_this_package(tmp_path: Path) -> None:
    model = converted()
    file = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(model, (image(),)), file)
    torch.save((image(), model(image()).detach()), tmp_path / "expected")
    script = (
        "import sys; sys.modules['steadygrad'] = None\n"
        "import torch\n"
        "x, want = torch.load(sys.argv[2])\n"
        "torch.testing.assert_close(torch.export.load(sys.argv[1]).module()(x).detach(), want)\n"
    )
    command = [sys.executable, "-c", script, str(file), str(tmp_path / "expected")]
    subprocess.run(command, check=True, timeout=100)


@pytest.mark.filterwarnings("ignore")  # the tracer is deprecated
@pytest.mark.parametrize("training", [False, True])
def test_a_trace_holds_torchs_operators_alone(training: bool) -> None:
    model = converted().train(training)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        traced = torch.jit.trace(model, (image(),), check_trace=False)
        twin(image())  # the trace has run once, too
        kinds = {node.kind().partition("::")[0] for node in traced.inlined_graph.nodes()}
        assert kinds <= {"aten", "prim"}
        torch.testing.assert_close(traced(image()), twin(image()))


@pytest.mark.filterwarnings("ignore")  # the exporters give warnings
@pytest.mark.parametrize("dynamo", [True, False], ids=["torch.export", "TorchScript"])
def test_onnx(tmp_path: Path, dynamo: bool) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model = converted()
    file = str(tmp_path / "model.onnx")
    torch.onnx.export(model, (image(),), file, dynamo=dynamo)
    graph = onnx.load(file)
    assert {node.domain for node in graph.graph.node} == {""}
    run = pytest.importorskip("onnx.reference").ReferenceEvaluator(graph)
    (got,) = run.run(None, {graph.graph.input[0].name: image().numpy()})
    torch.testing.assert_close(torch.from_numpy(got), model(image()).detach())


def test_training_over_ranks_is_refused() -> None:
    """Refuse to export training over ranks, since collectives cannot be exported."""
    model = sg.nn.BatchNorm2d(3, process_group=object())
    with pytest.raises(
        TypeError, match=r"process_group: .*exported or traced in training.*model\.eval\(\)"
    ):
        torch.export.export(model, (image(),))
    assert operations(torch.export.export(model.eval(), (image(),))) == {"aten"}
