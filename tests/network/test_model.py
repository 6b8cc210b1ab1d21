import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mnist_batchnorm.core.errors import CheckFailedError, UserError
from mnist_batchnorm.network.frozen import batch_norm_layers, require_frozen
from mnist_batchnorm.network.model import Architecture, Checkpoint, load_checkpoint, save_checkpoint

LECTURE = (784, 32, 32, 10)
SMALL = Architecture((6, 5, 4, 3), batch_norm=True, bn_momentum=0.2, bn_eps=1e-4)


PROVENANCE = {"train_sha256": "0" * 64, "params": {"lr": 0.01}}


def a_checkpoint(architecture: Architecture = SMALL) -> Checkpoint:
    model = architecture.build(seed=1)
    model(torch.rand(8, architecture.widths[0], generator=torch.Generator().manual_seed(1)))
    return Checkpoint(architecture, model.state_dict(), PROVENANCE)


def test_networks_are_the_lectures() -> None:
    def layers(model: nn.Sequential) -> list[str]:
        return [str(layer).partition(", bias")[0] for layer in model]

    assert layers(Architecture(LECTURE, batch_norm=False).build()) == [
        "Linear(in_features=784, out_features=32",
        "ReLU()",
        "Linear(in_features=32, out_features=32",
        "ReLU()",
        "Linear(in_features=32, out_features=10",
    ]
    bn = Architecture(LECTURE, batch_norm=True).build()
    assert [type(layer) for layer in bn] == [
        *(nn.Linear, nn.BatchNorm1d, nn.ReLU),
        *(nn.Linear, nn.BatchNorm1d, nn.ReLU),
        nn.Linear,
    ]


@pytest.mark.parametrize(
    ("batch_norm", "parameters", "statistics"),
    [
        (False, 784 * 32 + 32 + 32 * 32 + 32 + 32 * 10 + 10, 0),
        (True, 26_506 + 2 * (32 + 32), 2 * (32 + 32 + 1)),
    ],
)
def test_parameter_counts(batch_norm: bool, parameters: int, statistics: int) -> None:
    model = Architecture(LECTURE, batch_norm).build()
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == parameters
    assert sum(buffer.numel() for buffer in model.buffers()) == statistics


def test_other_widths_make_another_network() -> None:
    model = Architecture((4, 3, 2), batch_norm=True).build()
    assert model(torch.zeros(5, 4)).shape == (5, 2)
    assert list(dict(model.named_children())) == ["linear1", "bn1", "relu1", "linear2"]


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_both_networks_start_from_the_same_linear_layers(seed: int) -> None:
    bn = Architecture(LECTURE, batch_norm=True).build(seed).state_dict()
    plain = Architecture(LECTURE, batch_norm=False).build(seed).state_dict()
    assert len(plain) == 6
    assert all(torch.equal(bn[name], tensor) for name, tensor in plain.items())


def test_seed_decides_the_initial_weights() -> None:
    first, again, other = (SMALL.build(seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["linear1.weight"], other["linear1.weight"])


def test_initial_weights_are_pytorchs_default() -> None:
    state = torch.random.get_rng_state()
    torch.manual_seed(3)
    first = nn.Linear(6, 5)
    torch.random.set_rng_state(state)
    assert torch.equal(SMALL.build(3).get_parameter("linear1.weight"), first.weight)


def test_build_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    SMALL.build(seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    saved = a_checkpoint()
    save_checkpoint(tmp_path / "bn.safetensors", saved)
    loaded = load_checkpoint(tmp_path / "bn.safetensors")
    assert loaded.architecture == SMALL
    assert loaded.provenance == saved.provenance
    assert loaded.state.keys() == saved.state.keys()
    for name, tensor in saved.state.items():
        assert loaded.state[name].dtype == tensor.dtype
        assert loaded.state[name].numpy().tobytes() == tensor.numpy().tobytes()


def test_rebuilt_network_computes_the_same_and_is_frozen(tmp_path: Path) -> None:
    checkpoint = a_checkpoint()
    original = SMALL.build()
    original.load_state_dict(checkpoint.state)
    save_checkpoint(tmp_path / "bn.safetensors", checkpoint)
    rebuilt = load_checkpoint(tmp_path / "bn.safetensors").model()
    require_frozen(rebuilt)
    x = torch.rand(9, 6, generator=torch.Generator().manual_seed(2))
    assert torch.equal(rebuilt(x), original.eval()(x))
    layer = batch_norm_layers(rebuilt)["bn1"]
    assert (layer.momentum, layer.eps) == (0.2, 1e-4)


def test_same_checkpoint_gives_the_same_bytes_however_its_tensors_lie(tmp_path: Path) -> None:
    checkpoint = a_checkpoint()
    turned = {k: v.mT.contiguous().mT for k, v in checkpoint.state.items() if v.ndim == 2}
    assert not turned["linear1.weight"].is_contiguous()
    for name, state in (("a", checkpoint.state), ("b", checkpoint.state | turned)):
        save_checkpoint(tmp_path / name, replace(checkpoint, state=state))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.usefixtures("small_disk")
def test_full_disk_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="too large"):
        save_checkpoint(tmp_path / "bn.safetensors", a_checkpoint(Architecture(LECTURE, True)))
    assert list(tmp_path.iterdir()) == []


def test_missing_checkpoint_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no .*bn\.safetensors; run `dvc repro train` first"):
        load_checkpoint(tmp_path / "bn.safetensors")


@pytest.mark.parametrize("damage", ["folder", "empty", "truncated", "garbage"])
def test_unreadable_checkpoint_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "bn.safetensors"
    save_checkpoint(path, a_checkpoint())
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    else:
        path.write_bytes({"empty": b"", "truncated": content[:-1], "garbage": b"\xff" * 99}[damage])
    with pytest.raises(UserError, match=r"bn\.safetensors is not a readable safetensors file: "):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"format": "pt"},
        {"mnist_batchnorm": "not JSON"},
        {"mnist_batchnorm": "[]"},
        {"mnist_batchnorm": "{}"},
        {"mnist_batchnorm": json.dumps({"architecture": {"widths": 3}, "provenance": {}})},
        {"mnist_batchnorm": json.dumps({"architecture": {"widths": [6, 3]}, "provenance": {}})},
        {
            "mnist_batchnorm": json.dumps(
                {"architecture": {"widths": [6, 3], "batch_norm": True, "x": 1}, "provenance": {}}
            )
        },
        {
            "mnist_batchnorm": json.dumps(
                {"architecture": {"widths": [6], "batch_norm": True}, "provenance": PROVENANCE}
            )
        },
    ],
)
def test_foreign_safetensors_file_is_refused(
    tmp_path: Path, metadata: dict[str, str] | None
) -> None:
    path = tmp_path / "bn.safetensors"
    save_file(a_checkpoint().state, path, metadata)
    with pytest.raises(UserError, match=r"bn\.safetensors is not a checkpoint of this project"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"linear1.weight": None}, r'Missing key.*"linear1\.weight"'),
        ({"bn2.running_var": None}, r'Missing key.*"bn2\.running_var"'),
        ({"linear3.weight": torch.zeros(3, 5)}, r"size mismatch for linear3\.weight"),
        ({"bn3.weight": torch.zeros(3)}, r'Unexpected key.*"bn3\.weight"'),
    ],
)
def test_weights_that_do_not_fit_are_named(change: dict[str, Any], named: str) -> None:
    checkpoint = a_checkpoint()
    state = {
        name: tensor for name, tensor in (checkpoint.state | change).items() if tensor is not None
    }
    with pytest.raises(UserError, match=rf"(?s)do not fit its network: .*{named}"):
        replace(checkpoint, state=state).model()


def test_checkpoint_without_an_update_count_does_not_pass_for_a_trained_one() -> None:
    checkpoint = a_checkpoint()
    state = {k: v for k, v in checkpoint.state.items() if k != "bn1.num_batches_tracked"}
    with pytest.raises((UserError, CheckFailedError), match="bn1"):
        require_frozen(replace(checkpoint, state=state).model())


def test_weights_of_another_precision_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bn.safetensors"
    checkpoint = a_checkpoint()
    halved = checkpoint.state | {"linear1.weight": checkpoint.state["linear1.weight"].half()}
    save_checkpoint(path, replace(checkpoint, state=halved))
    with pytest.raises(UserError, match=r"linear1\.weight not float32"):
        load_checkpoint(path)


def test_network_with_a_weight_that_is_not_finite_is_not_frozen() -> None:
    checkpoint = a_checkpoint()
    broken = checkpoint.state | {"linear1.bias": torch.full((5,), torch.nan)}
    with pytest.raises(CheckFailedError, match=r"not finite: linear1\.bias"):
        require_frozen(replace(checkpoint, state=broken).model())
