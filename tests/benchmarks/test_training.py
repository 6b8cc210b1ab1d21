import statistics
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from benchmarks.training import CONTENDERS, Measured, Rates, figures, medians, step_flops, table_row
from benchmarks.training_check import LIMIT, STEPS, Trial, check, difference
from benchmarks.training_job import BOTH
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import training
from mnist_batchnorm.core.params import Params
from mnist_batchnorm.core.paths import PREPARED, RAW, VARIANTS
from mnist_batchnorm.training.loop import architecture


@pytest.fixture(params=VARIANTS)
def trial(request: pytest.FixtureRequest, params: Params) -> Trial:
    return Trial.make(request.param, params.train)


def test_trial_takes_its_steps_in_several_epochs(trial: Trial) -> None:
    orders = trial.orders()
    assert sum(map(len, orders)) == STEPS
    assert len(orders) > 1
    assert not torch.equal(orders[0], orders[1])
    assert orders[0].numel() < len(trial.split.labels)  # a remainder is dropped


def test_difference_sees_every_constant(trial: Trial) -> None:
    # otherwise agreement would mean nothing: every constant of the step has to count
    expected = trial.plain()
    for change in ({"lr": trial.params.lr * 1.001}, {"bn_momentum": 0.11}, {"bn_eps": 1.1e-5}):
        if trial.variant == "plain" and "lr" not in change:
            continue
        params = trial.params.model_copy(update=change)
        assert difference(Trial(trial.variant, params, trial.split).plain(), expected) > LIMIT


def test_the_engine_and_jax_compute_what_the_plain_loop_does(
    params: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(params.train) == 0
    assert "| bn | " in capsys.readouterr().out


def test_flops_are_those_that_pytorch_counts(params: Params) -> None:
    network = architecture("plain", params.train)
    model = network.build()
    inputs = torch.zeros(params.train.batch_size, network.widths[0])
    labels = torch.zeros(params.train.batch_size, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(inputs), labels).backward()  # type: ignore[no-untyped-call]
    assert step_flops(network.widths, params.train.batch_size) == counter.get_total_flops()


def measured(training: dict[str, float], evaluation: dict[str, float]) -> Measured:
    return Measured(training, evaluation, startup=1.0, warm_up=2.0, memory=None)


def test_networks_of_a_process_take_their_turns() -> None:
    row = figures([measured({"bn": 4.0, "plain": 2.0}, {"bn": 1.0, "plain": 0.5})], 100, 32)
    assert row.step == {"bn": 0.04, "plain": 0.02}
    assert row.epoch == 7.5
    assert row.rate == 2 * 100 * 32 / 6.0


def test_processes_run_side_by_side() -> None:
    pair = [measured({"bn": 4.0}, {"bn": 1.0}), measured({"plain": 2.0}, {"plain": 0.5})]
    row = figures(pair, 100, 32)
    assert row.epoch == 5.0
    assert row.rate == 2 * 100 * 32 / 4.0


def test_row_shows_medians_the_ratio_and_the_share() -> None:
    repeats = [figures([measured({BOTH: t}, {BOTH: 1.0})], 1000, 32) for t in (3.0, 9.0, 1.0)]
    assert medians(repeats).epoch == statistics.median([4.0, 10.0, 2.0])
    cells = table_row(CONTENDERS[0], medians(repeats), lecture=8.0, floor=0.0003).split(" | ")
    assert cells[2:5] == ["3,000 together", "4.00", "2.0"]
    assert cells[6] == "10%"


def test_floor_has_products_and_traffic(params: Params) -> None:
    only_products = training.floor_seconds("plain", params.train, Rates(1e9, float("inf")))
    only_traffic = training.floor_seconds("plain", params.train, Rates(float("inf"), 1e9))
    both = training.floor_seconds("plain", params.train, Rates(1e9, 1e9))
    assert both == pytest.approx(only_products + only_traffic)
    assert min(only_products, only_traffic) > 0


@pytest.mark.slow
def test_whole_table(
    project: Path,
    raw: Path,
    prepared: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (project / "data").mkdir()
    (project / RAW).symlink_to(raw)
    (project / PREPARED).symlink_to(prepared)
    arguments = ["training", "--images", "320", "--repeats", "1", "--epochs", "1"]
    monkeypatch.setattr("sys.argv", arguments)
    assert training.main() == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[1:]] == [f"| {c.name}" for c in CONTENDERS]
    assert "1.0" in {row.split(" | ")[4] for row in rows[1:3]}  # the lecture is the measure
