"""An interrupted run ends with the bits of an uninterrupted one; no other run resumes from it."""

import errno
import io
import json
import os
import pickle
import platform
import resource
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mnist_batchnorm.artifacts.curves import Epoch
from mnist_batchnorm.core import files
from mnist_batchnorm.core.params import Params, TrainParams
from mnist_batchnorm.core.paths import VARIANTS
from mnist_batchnorm.training import checkpoint as module
from mnist_batchnorm.training.autograd import AutogradTrainer
from mnist_batchnorm.training.checkpoint import TrainingCheckpoint, cache_key, processor
from mnist_batchnorm.training.devices import DeviceSplit
from mnist_batchnorm.training.fused import FusedTrainer
from mnist_batchnorm.training.loop import architecture, fit, make_trainer, shuffled_batches
from tests.conftest import ROOT, fill
from tests.support.import_closure import closure

CPU = torch.device("cpu")
KEY = "5ca1ab1e" * 8
EPOCHS = 4
# (network, whether a hook makes autograd train it)
TRAININGS = [(variant, by_autograd) for variant in VARIANTS for by_autograd in (False, True)]

every_training = pytest.mark.parametrize(("variant", "by_autograd"), TRAININGS)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that runs are started in, empty."""
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def splits(prepared: Path) -> list[DeviceSplit]:
    """Ten batches to learn from, with a few images left over, and what to watch."""
    both = (DeviceSplit.load(prepared / f"{name}.safetensors", CPU) for name in ("train", "valid"))
    return [
        DeviceSplit(split.inputs[:n], split.labels[:n])
        for split, n in zip(both, (325, 100), strict=True)
    ]


@pytest.fixture(scope="module")
def hyperparameters(params: Params) -> TrainParams:
    return params.train.model_copy(update={"epochs": EPOCHS, "hidden": (8, 6)})


@dataclass(frozen=True)
class Ended:
    """What a whole run leaves."""

    curve: list[Epoch]
    weights: dict[str, bytes]
    checkpoint: bytes | None  # parameters, statistics, moments, generator, curve


Run = Callable[..., Ended]


def nothing(*_: object) -> None:
    pass


@pytest.fixture
def run(splits: list[DeviceSplit], hyperparameters: TrainParams) -> Run:
    """Train from the start, or from the checkpoint in the current folder."""

    def run(
        variant: str,
        by_autograd: bool = False,
        on_epoch: Callable[[Epoch], None] = nothing,
        progress: Callable[[int], None] = nothing,
        device: torch.device = CPU,
    ) -> Ended:
        model = network(variant, by_autograd, hyperparameters).to(device)
        train, valid = (DeviceSplit(s.inputs.to(device), s.labels.to(device)) for s in splits)
        checkpoint = TrainingCheckpoint(variant, KEY)
        curve = fit(model, train, valid, hyperparameters, on_epoch, progress, checkpoint)
        assert not any(module.training for module in model.modules())
        weights = {n: t.cpu().numpy().tobytes() for n, t in model.state_dict().items()}
        content = checkpoint.path.read_bytes() if checkpoint.path.is_file() else None
        return Ended(curve, weights, content)

    return run


def network(variant: str, by_autograd: bool, hyperparameters: TrainParams) -> nn.Sequential:
    model = architecture(variant, hyperparameters).build(hyperparameters.seed)
    if by_autograd:
        model.register_forward_hook(nothing)
    return model


class StopError(Exception):
    """Ends a run in a test."""


def stop_at(number: int) -> Callable[[Epoch], None]:
    def on_epoch(epoch: Epoch) -> None:
        if epoch.epoch == number:
            raise StopError

    return on_epoch


def interrupt(run: Run, *arguments: Any, **when: Any) -> None:
    with pytest.raises(StopError):
        run(*arguments, **when)


@pytest.fixture
def uninterrupted(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The same run in another folder."""

    def elsewhere(*arguments: Any) -> Ended:
        (tmp_path / "elsewhere").mkdir()
        with monkeypatch.context() as patch:
            patch.setenv("DVC_ROOT", str(tmp_path / "elsewhere"))
            return run(*arguments)

    return elsewhere


# --- going on -----------------------------------------------------------------------------------


@every_training
@pytest.mark.parametrize("epoch", range(1, EPOCHS + 1))
def test_run_interrupted_after_an_epoch_ends_with_the_same_bits(
    variant: str,
    by_autograd: bool,
    epoch: int,
    run: Run,
    uninterrupted: Run,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = uninterrupted(variant, by_autograd)
    assert expected.checkpoint is not None
    interrupt(run, variant, by_autograd, on_epoch=stop_at(epoch))
    assert "warning" not in capsys.readouterr().err
    assert run(variant, by_autograd) == expected
    path = TrainingCheckpoint(variant, KEY).path
    assert capsys.readouterr().err.endswith(f"going on after epoch {epoch}, from {path}\n")


@every_training
def test_run_interrupted_in_every_epoch_and_after_each_ends_with_the_same_bits(
    variant: str, by_autograd: bool, run: Run, uninterrupted: Run
) -> None:
    expected = uninterrupted(variant, by_autograd)
    for epoch in range(1, EPOCHS + 1):

        def in_the_next(taken: int, told: list[int] = [], epoch: int = epoch) -> None:  # noqa: B006
            told.append(taken)
            if len(told) == epoch:  # as often as whole epochs are told again
                raise StopError

        interrupt(run, variant, by_autograd, progress=in_the_next)
        interrupt(run, variant, by_autograd, on_epoch=stop_at(epoch))
    assert run(variant, by_autograd) == expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_fused_step_and_autograd_do_not_resume_from_each_other(
    variant: str, run: Run, uninterrupted: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = uninterrupted(variant, True)
    interrupt(run, variant, False, on_epoch=stop_at(2))
    assert run(variant, True) == expected
    assert "cannot be used, training starts anew" in capsys.readouterr().err


@every_training
def test_resumed_run_reports_the_epochs_before(
    variant: str, by_autograd: bool, run: Run, uninterrupted: Run
) -> None:
    expected = uninterrupted(variant, by_autograd)
    interrupt(run, variant, by_autograd, on_epoch=stop_at(3))
    told: list[Epoch] = []
    taken: list[int] = []
    assert run(variant, by_autograd, told.append, taken.append) == expected
    assert told == expected.curve
    assert taken == [10] * EPOCHS


@pytest.mark.parametrize("variant", VARIANTS)
def test_saving_checkpoints_does_not_change_the_training(
    variant: str, run: Run, splits: list[DeviceSplit], hyperparameters: TrainParams
) -> None:
    ended = run(variant)
    model = network(variant, False, hyperparameters)
    train, valid = splits
    assert fit(model, train, valid, hyperparameters) == ended.curve
    assert {n: t.numpy().tobytes() for n, t in model.state_dict().items()} == ended.weights


def test_run_that_had_ended_takes_no_step(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = run("bn")
    monkeypatch.setattr(FusedTrainer, "run", nothing)
    assert run("bn") == ended


@pytest.mark.gpu
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("variant", VARIANTS)
def test_run_on_a_gpu_ends_with_the_same_bits(variant: str, run: Run, uninterrupted: Run) -> None:
    gpu = torch.device("cuda")
    expected = uninterrupted(variant, False, nothing, nothing, gpu)
    interrupt(run, variant, on_epoch=stop_at(2), device=gpu)
    assert run(variant, device=gpu) == expected


# --- the state ----------------------------------------------------------------------------------


def bits(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: tensor.detach().numpy().tobytes() for name, tensor in tensors.items()}


@every_training
def test_state_comes_back_bit_for_bit(
    variant: str, by_autograd: bool, splits: list[DeviceSplit], hyperparameters: TrainParams
) -> None:
    data, _ = splits
    generator, other = torch.Generator().manual_seed(3), torch.Generator()
    trainer, fresh = (
        make_trainer([network(variant, by_autograd, hyperparameters)], data, 32, 0.01)
        for _ in range(2)
    )
    assert type(trainer) is (AutogradTrainer if by_autograd else FusedTrainer)
    trainer.run(shuffled_batches(len(data.labels), 32, generator)[None], nothing)
    curve = [Epoch(1, 1 / 3, 0.1 + 0.2, 5e-324, 1.0)]
    checkpoint = TrainingCheckpoint(variant, KEY)
    checkpoint.save(trainer.tensors, [generator], [asdict(row) for row in curve])
    assert checkpoint.epochs == 1

    again = TrainingCheckpoint(variant, KEY)
    assert again.epochs == 0
    assert [Epoch(**row) for row in again.restore(fresh.tensors, [other])] == curve
    assert again.epochs == 1
    assert bits(fresh.tensors) == bits(trainer.tensors)
    assert torch.equal(other.get_state(), generator.get_state())


@every_training
def test_state_is_all_that_a_step_changes(
    variant: str, by_autograd: bool, splits: list[DeviceSplit], hyperparameters: TrainParams
) -> None:
    data, _ = splits
    model = network(variant, by_autograd, hyperparameters)
    tensors = make_trainer([model], data, 32, 0.01).tensors
    moments = {f"{n}.{m}" for n, _ in model.named_parameters() for m in ("exp_avg", "exp_avg_sq")}
    assert tensors.keys() >= model.state_dict().keys() | moments
    assert any(name.endswith("step") for name in tensors)


def test_checkpoint_is_safetensors_in_the_repository(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "repository").mkdir()
    monkeypatch.setenv("DVC_ROOT", str(folder / "repository"))  # this is a temporary copy of it
    interrupt(run, "bn", on_epoch=stop_at(2))
    (path,) = (folder / "repository/.checkpoints").iterdir()
    assert path.name == f"bn-{KEY[:16]}.safetensors"
    with safe_open(path, framework="pt") as stored:
        content = json.loads(stored.metadata()["mnist_batchnorm"])
        assert {"linear1.weight", "linear1.weight.exp_avg", "generators"} <= set(stored.keys())
    assert content["key"] == KEY
    assert [row["epoch"] for row in content["rows"]] == [1, 2]


# --- what cannot be used ------------------------------------------------------------------------


def truncate(share: float) -> Callable[[Path], object]:
    def spoil(path: Path) -> None:
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])

    return spoil


def rewrite(
    tensors: Callable[[dict[str, Tensor]], object] = nothing,
    metadata: Callable[[dict[str, Any]], object] = nothing,
) -> Callable[[Path], object]:
    """Change the content of a file that stays a safetensors file."""

    def spoil(path: Path) -> None:
        with safe_open(path, framework="pt") as stored:
            held = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            content = json.loads(stored.metadata()["mnist_batchnorm"])
        tensors(held)
        metadata(content)
        save_file(held, path, {"mnist_batchnorm": json.dumps(content)})

    return spoil


def become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


class Malice:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("pickle was loaded",))


def become_a_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Malice()))


def become_a_torch_file(path: Path) -> None:
    stream = io.BytesIO()
    torch.save({"linear1.weight": Malice()}, stream)
    path.write_bytes(stream.getvalue())


SPOILT: dict[str, Callable[[Path], object]] = {
    "empty": truncate(0),
    "half": truncate(0.5),
    "without its last bytes": truncate(0.999),
    "header alone": truncate(0.02),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "garbage": lambda path: path.write_bytes(b"\xa7" * 4096),
    "a folder": become_a_folder,
    "a pickle": become_a_pickle,
    "PyTorch's own format": become_a_torch_file,
    "no metadata": lambda path: save_file({"generators": torch.zeros(1)}, path),
    "a tensor missing": rewrite(lambda held: held.pop("linear2.weight.exp_avg")),
    "no generator": rewrite(lambda held: held.pop("generators")),
    "another network's shapes": rewrite(
        lambda held: held.update({"linear3.bias": torch.zeros(1, 11)})
    ),
    "another type": rewrite(
        lambda held: held.update({"linear3.bias": held["linear3.bias"].double()})
    ),
    "a short generator": rewrite(lambda held: held.update(generators=held["generators"][:, :-1])),
    "a broken generator": rewrite(
        lambda held: held.update(generators=torch.zeros_like(held["generators"]))
    ),
    "another key": rewrite(metadata=lambda content: content.update(key=KEY[:16] + "0" * 48)),
    "no key": rewrite(metadata=lambda content: content.pop("key")),
    "a curve of other columns": rewrite(metadata=lambda content: content["rows"][0].pop("epoch")),
    "no curve": rewrite(metadata=lambda content: content.update(rows=None)),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_checkpoint_that_cannot_be_used_is_a_warning_and_a_new_start(
    spoil: Callable[[Path], object],
    run: Run,
    uninterrupted: Run,
    splits: list[DeviceSplit],
    hyperparameters: TrainParams,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = uninterrupted("bn")
    interrupt(run, "bn", on_epoch=stop_at(2))
    checkpoint = TrainingCheckpoint("bn", KEY)
    spoil(checkpoint.path)

    tensors = make_trainer([network("bn", False, hyperparameters)], splits[0], 32, 0.01).tensors
    generator = torch.Generator().manual_seed(3)
    before = bits(tensors), generator.get_state()
    assert checkpoint.restore(tensors, [generator]) == []
    assert checkpoint.epochs == 0
    assert bits(tensors) == before[0]
    assert torch.equal(generator.get_state(), before[1])
    (line,) = capsys.readouterr().err.splitlines()
    start = f"warning: {checkpoint.path} cannot be used, training starts anew: "
    assert line.startswith(start)
    assert len(line) > len(start)

    ended = run("bn")
    assert (ended.curve, ended.weights) == (expected.curve, expected.weights)
    if checkpoint.path.is_file():  # and so it has been replaced
        assert ended.checkpoint == expected.checkpoint
    assert not (folder / "pickle was loaded").exists()


def test_no_checkpoint_is_no_warning(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run("bn")
    assert capsys.readouterr().err == ""


def test_checkpoint_with_another_key_is_ignored(
    splits: list[DeviceSplit],
    hyperparameters: TrainParams,
    run: Run,
    capsys: pytest.CaptureFixture[str],
) -> None:
    interrupt(run, "bn", on_epoch=stop_at(2))
    tensors = make_trainer([network("bn", False, hyperparameters)], splits[0], 32, 0.01).tensors
    other = TrainingCheckpoint("bn", "0" * 64)
    assert other.restore(tensors, [torch.Generator()]) == []
    assert capsys.readouterr().err == ""
    assert TrainingCheckpoint("plain", KEY).path != TrainingCheckpoint("bn", KEY).path != other.path


# --- disks that are full or read-only -----------------------------------------------------------


def epochs_kept() -> int:
    with safe_open(TrainingCheckpoint("bn", KEY).path, framework="pt") as stored:
        return len(json.loads(stored.metadata()["mnist_batchnorm"])["rows"])


def warnings(text: str) -> list[str]:
    assert all(line.startswith("warning: no checkpoint of epoch ") for line in text.splitlines())
    return [line.removeprefix("warning: no checkpoint of epoch ") for line in text.splitlines()]


def test_disk_that_fills_up_costs_the_checkpoint_and_not_the_run(
    run: Run,
    uninterrupted: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = uninterrupted("bn")
    left = iter([True, True])

    def fills_up(path: Path, content: bytes) -> None:
        if not next(left, False):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        files.write_bytes(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_bytes", fills_up)
        ended = run("bn")
    assert (ended.curve, ended.weights) == (expected.curve, expected.weights)
    assert warnings(capsys.readouterr().err) == [
        f"{epoch}: [Errno 28] No space left on device" for epoch in (3, 4)
    ]
    assert epochs_kept() == 2
    assert run("bn") == expected
    assert "going on after epoch 2, from " in capsys.readouterr().err


def test_disk_that_takes_a_part_keeps_the_checkpoint_before(
    run: Run, uninterrupted: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = uninterrupted("bn")
    interrupt(run, "bn", on_epoch=stop_at(1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        ended = run("bn")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (ended.curve, ended.weights) == (expected.curve, expected.weights)
    assert "no checkpoint of epoch 2: [Errno 27] File too large" in capsys.readouterr().err
    assert epochs_kept() == 1
    path = TrainingCheckpoint("bn", KEY).path
    assert list(path.parent.iterdir()) == [path]
    assert run("bn") == expected


def test_real_disk_that_fills_up_keeps_the_checkpoint_before(
    mount: Callable[[Path, str], None],
    run: Run,
    uninterrupted: Run,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = folder / ".checkpoints"
    mount(place, "256k")
    expected = uninterrupted("bn")

    def fills_up(epoch: Epoch) -> None:
        if epoch.epoch == 2:
            fill(place)

    ended = run("bn", False, fills_up)
    assert (ended.curve, ended.weights) == (expected.curve, expected.weights)
    assert warnings(capsys.readouterr().err) == [
        f"{epoch}: [Errno 28] No space left on device" for epoch in (3, 4)
    ]
    assert epochs_kept() == 2
    assert {path.name for path in place.iterdir()} == {
        "filler",
        TrainingCheckpoint("bn", KEY).path.name,
    }
    (place / "filler").unlink()
    assert run("bn") == expected


def test_place_that_cannot_be_written_costs_the_checkpoints_and_not_the_run(
    run: Run, uninterrupted: Run, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = uninterrupted("bn")
    (folder / ".checkpoints").write_text("no folder")
    ended = run("bn")
    assert (ended.curve, ended.weights) == (expected.curve, expected.weights)
    lines = capsys.readouterr().err.splitlines()
    told = warnings("\n".join(line for line in lines if "cannot be used" not in line))
    assert [line[0] for line in told] == ["1", "2", "3", "4"]
    assert (folder / ".checkpoints").read_text() == "no folder"


def test_interruption_while_a_checkpoint_is_written_keeps_the_one_before(
    run: Run, uninterrupted: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = uninterrupted("bn")
    interrupt(run, "bn", on_epoch=stop_at(2))

    def before_the_rename(path: Path, target: Path) -> Path:
        assert path.stat().st_size >= target.stat().st_size
        raise StopError

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", before_the_rename)
        interrupt(run, "bn")
    assert epochs_kept() == 2
    assert run("bn") == expected


# --- which run it is ----------------------------------------------------------------------------


@pytest.fixture
def data(folder: Path) -> dict[str, Path]:
    paths = {role: folder / f"{role}.safetensors" for role in ("train", "valid")}
    for role, path in paths.items():
        path.write_bytes(role.encode())
    return paths


@pytest.fixture
def source(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package that the key is computed from."""
    copy = folder / "package"
    shutil.copytree(module.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(module, "PACKAGE", copy)
    return copy


@pytest.fixture
def key(data: dict[str, Path], source: Path, params: Params) -> Callable[..., str]:
    """The key of a run, by default with the committed parameters on the CPU."""

    def key(device: torch.device = CPU, **changed: object) -> str:
        hyperparameters = params.train.model_dump(mode="json", exclude={"device"})
        return cache_key({"variant": "bn", **hyperparameters, **changed}, data, device)

    return key


def test_key_is_the_same_for_the_same_run(key: Callable[..., str]) -> None:
    assert key() == key()
    assert len(key()) == 64


@pytest.mark.parametrize(
    "changed",
    [
        {"variant": "plain"},
        {"seed": 3},
        {"hidden": [32, 31]},
        {"hidden": [32]},
        {"epochs": 11},
        {"batch_size": 31},
        {"lr": 0.010000000000000002},
        {"bn_momentum": 0.2},
        {"bn_eps": 1e-6},
        {"portable": True},
    ],
    ids=str,
)
def test_key_changes_with_each_parameter(
    changed: dict[str, object], key: Callable[..., str]
) -> None:
    assert key(**changed) != key()


def test_every_parameter_of_training_is_tried() -> None:
    (mark,) = test_key_changes_with_each_parameter.pytestmark
    tried = {name for changed in mark.args[1] for name in changed}
    assert tried == {"variant", *TrainParams.model_fields} - {"device"}


@pytest.mark.parametrize("role", ["train", "valid"])
def test_key_changes_with_one_bit_of_the_data(
    role: str, key: Callable[..., str], data: dict[str, Path]
) -> None:
    before = key()
    content = bytearray(data[role].read_bytes())
    content[-1] ^= 1
    data[role].write_bytes(content)
    assert key() != before


def test_key_changes_when_the_splits_are_exchanged(
    key: Callable[..., str], data: dict[str, Path]
) -> None:
    before = key()
    data["train"].rename("other")
    data["valid"].rename(data["train"])
    Path("other").rename(data["valid"])
    assert key() != before


def edit(path: Path) -> None:
    path.write_text(path.read_text() + "\n")


@pytest.mark.parametrize(
    "change",
    [
        lambda source: edit(source / "training/fused.py"),
        lambda source: edit(source / "artifacts/splits.py"),
        lambda source: (source / "core/arrays.py").rename(source / "core/types.py"),
        lambda source: (source / "core/threads.py").unlink(),
        lambda source: (source / "network/new.py").touch(),
    ],
    ids=["edited", "edited artifact", "renamed", "deleted", "added"],
)
def test_key_changes_with_the_code_of_training(
    change: Callable[[Path], object], key: Callable[..., str], source: Path
) -> None:
    before = key()
    change(source)
    assert key() != before


def test_training_interrupted_before_an_edit_elsewhere_can_be_resumed(
    key: Callable[..., str], source: Path
) -> None:
    before = key()
    for name in ("artifacts/registry_file.py", "serve/http/routes.py", "parity/gate.py", "cli.py"):
        edit(source / name)
    assert key() == before


# artifacts that a training writes and never reads
ONLY_WRITTEN = {"curves", "metrics", "reading"}


def test_key_covers_the_code_that_a_training_imports() -> None:
    prefix = "src/mnist_batchnorm/"
    names = ("loop", "replicas", "worker")
    imported = set[str]().union(*(closure(f"mnist_batchnorm.training.{name}") for name in names))
    written = {f"{prefix}artifacts/{name}.py" for name in ONLY_WRITTEN}
    assert written < imported
    covered = {str(path.relative_to(ROOT)) for path in module.code_files()}
    assert imported - written - covered == {f"{prefix}artifacts/__init__.py"}  # a docstring
    for name in module.CODE:
        assert any(path.startswith(prefix + name) for path in imported), name


@pytest.mark.parametrize(
    "name",
    [
        "ATEN_CPU_CAPABILITY",
        "MKL_CBWR",
        "MKL_ENABLE_INSTRUCTIONS",
        "ONEDNN_MAX_CPU_ISA",
        "DNNL_MAX_CPU_ISA",
        "GLIBC_TUNABLES",
    ],
)
def test_key_changes_with_what_chooses_the_kernels(
    name: str, key: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(name, raising=False)
    unset = key()
    monkeypatch.setenv(name, "one")
    first = key()
    monkeypatch.setenv(name, "another")
    assert len({unset, first, key()}) == 3


def test_key_changes_with_the_machine(
    key: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {key()}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100")
    found |= {key(torch.device("cuda:0")), key(torch.device("cuda:1"))}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    found.add(key(torch.device("cuda:0")))
    monkeypatch.setattr(module, "processor", lambda: "vendor_id : another")
    found.add(key())
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX1024")
    found.add(key())
    monkeypatch.setattr(torch.__config__, "show", lambda: "PyTorch built with: another BLAS")
    found.add(key())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    found.add(key())
    assert len(found) == 8


def test_key_does_not_change_with_anything_else(
    key: Callable[..., str], source: Path, data: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = key()
    for name in ("HOME", "LANG", "MLFLOW_TRACKING_URI", "DVC_EXP_NAME", "DVC_ROOT", "COLUMNS"):
        monkeypatch.setenv(name, "another")
    (source / "training/__pycache__").mkdir()
    (source / "training/__pycache__/fused.cpython-311.pyc").write_bytes(b"compiled")
    for path in (*data.values(), source / "training/fused.py"):
        os.utime(path, (0, 0))
    torch.rand(1)
    assert key() == before


def test_processor_is_named_without_what_changes_from_moment_to_moment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    core = (
        "processor\t: {n}\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 85\n"
        "model name\t: Xeon\nstepping\t: 7\nmicrocode\t: 0x1\ncpu MHz\t\t: {mhz}\n\n"
    )
    texts = [
        core.format(n=0, mhz=2500) + core.format(n=1, mhz=800),
        core.format(n=0, mhz=1900),
        core.format(n=0, mhz=1900).replace(": 85", ": 86"),
    ]
    named = []
    for text in texts:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_text", lambda *_, text=text, **__: text)
            named.append(processor())
    assert named[0] == named[1] != named[2]
    assert "Xeon" in named[0]
    assert "MHz" not in named[0]


def test_processor_is_named_without_proc_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert processor() == platform.processor()


def test_processor_of_this_machine_has_a_name() -> None:
    assert processor()
    assert processor() == processor()


def test_data_that_is_missing_is_not_hidden(key: Callable[..., str], data: dict[str, Path]) -> None:
    data["train"].unlink()
    with pytest.raises(FileNotFoundError):
        key()
