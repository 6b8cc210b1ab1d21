import csv
import json
import shutil
import statistics
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from scipy import stats
from torch import nn

from mnist_batchnorm.core.params import Params
from mnist_batchnorm.core.paths import SPLITS, VARIANTS
from mnist_batchnorm.network.model import Architecture
from mnist_batchnorm.training import replicas as module
from mnist_batchnorm.training.devices import DeviceSplit
from mnist_batchnorm.training.loop import architecture, fit, measure
from tests.conftest import MnistBn

EPOCHS, COUNT = 2, 3


@pytest.fixture(autouse=True)
def settings_of_torch() -> Iterator[None]:
    """Take back what the command asks of PyTorch."""
    threads = torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture
def folder(project: Path, prepared: Path) -> Path:
    """A project whose data is prepared and whose trainings are short."""
    shutil.copytree(prepared, project / "data/prepared")
    text = (project / "params.yaml").read_text()
    text = text.replace("epochs: 10", f"epochs: {EPOCHS}").replace("count: 5", f"count: {COUNT}")
    (project / "params.yaml").write_text(text)
    return project


def test_command_writes_the_figures_of_every_seed(folder: Path, mnist_bn: MnistBn) -> None:
    done = mnist_bn("seeds")
    assert done.status == 0, done.err
    summary = json.loads((folder / "reports/metrics/seeds.json").read_text())
    assert summary["seeds"] == COUNT
    assert summary["device"] == "cpu"
    values = {v: summary[v]["test_accuracy"]["values"] for v in VARIANTS}
    for variant, accuracies in values.items():
        assert len(set(accuracies)) > 1  # seeds of their own
        of = summary[variant]["test_accuracy"]
        assert of["mean"] == pytest.approx(statistics.mean(accuracies))
        assert of["sd"] == pytest.approx(statistics.stdev(accuracies))
    paired = stats.ttest_rel(values["bn"], values["plain"]).confidence_interval(0.95)
    gain = summary["bn_minus_plain"]["test_accuracy"]
    assert gain["interval_95"] == pytest.approx([paired.low, paired.high])
    assert gain["values"] == pytest.approx(
        [a - b for a, b in zip(values["bn"], values["plain"], strict=True)]
    )
    with (folder / "reports/curves/seeds.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(r["variant"], int(r["seed"]), int(r["epoch"])) for r in rows] == [
        (v, s, e) for v in VARIANTS for s in range(COUNT) for e in range(1, EPOCHS + 1)
    ]
    assert "bn - plain: " in done.out
    assert list((folder / ".checkpoints").iterdir()) == []

    first = (folder / "reports/metrics/seeds.json").read_bytes()
    assert mnist_bn("train", "--seeds", str(COUNT)).status == 0
    assert (folder / "reports/metrics/seeds.json").read_bytes() == first


def test_replicas_end_where_the_runs_of_their_seeds_do(folder: Path, params: Params) -> None:
    # to rounding, which moves a prediction or two; test_fused.py has the exact senses
    cpu = torch.device("cpu")
    splits = {name: DeviceSplit.load(folder / path, cpu) for name, path in SPLITS.items()}
    short = params.train.model_copy(update={"epochs": EPOCHS})
    for variant in VARIANTS:
        models = [architecture(variant, short).build(seed) for seed in (4, 5)]
        replicas = module.train_replicas(
            variant, models, [4, 5], splits, short, cpu, lambda _: None
        )
        for index, seed in enumerate([4, 5]):
            alone = architecture(variant, short).build(seed)
            of_seed = short.model_copy(update={"seed": seed})
            curve = fit(alone, splits["train"], splits["valid"], of_seed)
            accuracy = [row["valid_accuracy"][index] for row in replicas.rows]
            assert accuracy == pytest.approx([e.valid_accuracy for e in curve], abs=0.015)
            assert replicas.test_accuracy[index] == pytest.approx(
                measure(alone, splits["test"])[1], abs=0.015
            )


def test_interrupted_seeds_go_on_to_the_same_bits(
    folder: Path, mnist_bn: MnistBn, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert mnist_bn("seeds").status == 0
    whole = (folder / "reports/metrics/seeds.json").read_bytes()

    from mnist_batchnorm.training.checkpoint import TrainingCheckpoint

    save = TrainingCheckpoint.save
    both = threading.Barrier(2)  # the first to be interrupted stops the other

    def interrupted(self: TrainingCheckpoint, *arguments: object) -> None:
        save(self, *arguments)  # type: ignore[arg-type]
        both.wait(60)
        raise KeyboardInterrupt

    (folder / "reports/metrics/seeds.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(TrainingCheckpoint, "save", interrupted)
        assert mnist_bn("seeds").status == 130
    assert not (folder / "reports/metrics/seeds.json").exists()
    assert len(list((folder / ".checkpoints").iterdir())) == 2
    done = mnist_bn("seeds")
    assert done.status == 0
    assert "going on after epoch 1" in done.err
    assert (folder / "reports/metrics/seeds.json").read_bytes() == whole


@pytest.mark.parametrize("arguments", [("train", "--seeds", "1"), ("train", "--seeds", "many")])
def test_less_than_two_seeds_are_the_users_mistake(
    folder: Path, mnist_bn: MnistBn, arguments: tuple[str, ...]
) -> None:
    done = mnist_bn(*arguments)
    assert done.status == 2
    assert "--seeds" in done.err


def test_diverging_replica_fails_all(folder: Path, mnist_bn: MnistBn) -> None:
    text = (folder / "params.yaml").read_text()
    (folder / "params.yaml").write_text(text.replace("lr: 0.01", "lr: 1.0e+38"))
    done = mnist_bn("seeds")
    assert done.status == 1
    assert "no longer finite in epoch 1, step 2" in done.err


def test_networks_must_not_be_named_with_seeds(folder: Path, mnist_bn: MnistBn) -> None:
    done = mnist_bn("train", "bn", "--seeds", "2")
    assert done.status == 2
    assert "leave their names out" in done.err


def test_network_that_the_engine_does_not_know_is_trained_one_by_one(
    folder: Path, mnist_bn: MnistBn, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = Architecture.build

    def with_dropout(self: Architecture, seed: int = 0) -> nn.Sequential:
        layers = list(build(self, seed))
        return nn.Sequential(*layers[:-1], nn.Dropout(0.2), layers[-1])

    monkeypatch.setattr(Architecture, "build", with_dropout)
    outcomes = []
    for _ in range(2):
        done = mnist_bn("seeds")
        assert done.status == 0, done.err
        assert "plain loop" in done.err
        outcomes.append((folder / "reports/metrics/seeds.json").read_bytes())
    assert outcomes[0] == outcomes[1]


def test_no_memory_is_the_users_mistake(
    folder: Path, mnist_bn: MnistBn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        )

    monkeypatch.setattr(module, "train_replicas", full)
    done = mnist_bn("seeds")
    assert done.status == 2
    assert "not enough memory to train: lower" in done.err
