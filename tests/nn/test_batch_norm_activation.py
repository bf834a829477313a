"""A batch norm's own activation is kept, or named in an error, when another module is made from the batch norm."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao import quantization
from torch.nn.utils import fusion
from torch.optim.swa_utils import update_bn

import steadygrad as sg

# torch.utils.mkldnn is built on torch.jit, which gives this warning.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
NEXT = "to synchronise, call .*convert_batchnorm.*set activation to None"


def network(activation: str | None = "relu") -> nn.Sequential:
    """Return a convolution and a batch norm, some of whose outputs are negative without ReLU."""
    torch.manual_seed(0)
    norm = sg.nn.BatchNorm2d(4, activation=activation)
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm).eval()


def image() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def synchronized(model: nn.Sequential) -> Any:
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def synchronized_by_lightning(model: nn.Sequential) -> Any:
    layer_sync = pytest.importorskip("lightning.pytorch.plugins.layer_sync")
    return layer_sync.TorchSyncBatchNorm().apply(model)


def frozen_by_transformers(model: nn.Sequential) -> Any:
    detr = pytest.importorskip("transformers.models.detr.modeling_detr")
    with torch.no_grad():
        detr.replace_batch_norm(model)
    return model


def frozen_on_meta(model: nn.Sequential) -> Any:
    detr = pytest.importorskip("transformers.models.detr.modeling_detr")
    detr.replace_batch_norm(model.to("meta"))
    return model


def folded(model: nn.Sequential) -> Any:
    return fusion.fuse_conv_bn_eval(*model)


def folded_by_weights(model: nn.Sequential) -> Any:
    conv, norm = model
    running = (norm.running_mean, norm.running_var)
    return fusion.fuse_conv_bn_weights(
        conv.weight, conv.bias, *running, norm.eps, norm.weight, norm.bias
    )


def folded_into_linear(model: nn.Sequential) -> Any:
    linear = nn.Linear(3, 4).eval()
    return fusion.fuse_linear_bn_eval(linear, model[1])


def to_mkldnn(model: nn.Sequential) -> Any:
    from torch.utils import mkldnn

    return mkldnn.to_mkldnn(model)


@pytest.mark.parametrize(
    "rebuild",
    [
        synchronized,
        synchronized_by_lightning,
        frozen_by_transformers,
        frozen_on_meta,
        folded,
        folded_by_weights,
        folded_into_linear,
        to_mkldnn,
    ],
)
def test_what_reads_the_attributes_of_a_batch_norm_is_refused(
    rebuild: Callable[[nn.Sequential], Any],
) -> None:
    with pytest.raises(RuntimeError, match=f"activation='relu', .*{NEXT}"):
        rebuild(network())
    rebuild(network(None))  # without an activation nothing can be lost


@pytest.mark.parametrize("fuse", [quantization.fuse_modules, quantization.fuse_modules_qat])
def test_fusion_by_class_knows_none_of_ours(fuse: Any) -> None:
    model = network().train(fuse is quantization.fuse_modules_qat)
    with pytest.raises(AssertionError, match="did not find fuser method"):
        fuse(model, ["0", "1"])


@pytest.mark.parametrize("name", ["fuse", "optimize_for_inference"])
def test_fusion_of_graphs_leaves_it(name: str) -> None:
    from torch.fx.experimental import optimization

    fuse = getattr(optimization, name)
    model = network()
    assert torch.equal(fuse(copy.deepcopy(model))(image()) > 0, model(image()) > 0)


def test_an_activation_taken_away_frees_the_module() -> None:
    model = network()
    want = model(image())
    model[1].activation = None
    assert (model[1].eps, model[1].num_features) == (1e-5, 4)
    chain = nn.Sequential(fusion.fuse_conv_bn_eval(*model), nn.ReLU())
    torch.testing.assert_close(chain(image()), want)
    model[1].activation = "relu"
    with pytest.raises(RuntimeError, match=r"BatchNorm2d\.eps"):
        folded(model)


def test_whoever_asks_whether_there_is_eps_is_told_too() -> None:
    """Check getattr and hasattr: a default instead of ``eps`` would be as wrong as the value."""
    norm = network()[1]
    with pytest.raises(RuntimeError, match=r"BatchNorm2d\.eps"):
        getattr(norm, "eps", 1e-3)
    assert vars(norm)["eps"] == 1e-5
    assert not {"eps", "num_features"} & set(dir(norm))
    assert {"eps", "num_features"} <= set(dir(network(None)[1]))
    norm.eps = 0.5
    assert "eps=0.5" in repr(norm)
    torch.testing.assert_close(norm(image()[:, :1].expand(2, 4, 8, 8)).min(), torch.tensor(0.0))


def test_it_stays_a_batch_norm_to_whatever_looks_for_one() -> None:
    """Check tools that look for the class: groups without weight decay, frozen statistics, FSDP, update_bn."""
    model = network().train()
    assert isinstance(model[1], nn.BatchNorm2d)
    update_bn([image()], model)
    mean = model[0](image()).mean([0, 2, 3])
    torch.testing.assert_close(model[1].running_mean, mean.detach())
