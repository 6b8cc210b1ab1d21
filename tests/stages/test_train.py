"""The stage: whatever happens to it, it says so, and ends with the bytes of an undisturbed run."""

import csv
import json
import os
import pty
import random
import re
import shutil
import signal
import sys
import termios
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from mnist_batchnorm.artifacts.curves import Epoch, write_curve
from mnist_batchnorm.core.errors import CheckFailedError, UserError, as_users_mistake
from mnist_batchnorm.core.files import digest
from mnist_batchnorm.core.paths import VARIANTS
from mnist_batchnorm.network.model import load_checkpoint
from mnist_batchnorm.stages import train as stage
from mnist_batchnorm.training.fused import FusedTrainer
from tests.conftest import ROOT, MnistBn, fill
from tests.support import store
from tests.support.commands import Command, environment, kill, run, running
from tests.support.pipeline import Project, make_project

EPOCHS = 60  # a second or more, long enough to be disturbed at a chosen moment
STEPS = 56  # an epoch, of 32 of the 1,800 images
OUTPUTS = {
    variant: {
        f"models/{variant}.safetensors",
        f"reports/curves/{variant}.csv",
        f"reports/metrics/train-{variant}.json",
    }
    for variant in VARIANTS
}
TRAIN = ("mnist-bn", "train")
TELL_IMPORTS = (
    "import atexit, sys; from mnist_batchnorm.cli import main; "
    "atexit.register(lambda: print(*sys.modules, file=sys.stderr)); main()"
)

Files = dict[str, bytes]


def files(folder: Path) -> Files:
    """What training wrote, half files too."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for place in ("models", "reports")
        for path in sorted((folder / place).rglob("*"))
        if path.is_file()
    }


def of(variant: str, everything: Files) -> Files:
    return {name: everything[name] for name in OUTPUTS[variant]}


def kept(folder: Path) -> list[str]:
    """Names of the files in .checkpoints, half ones too."""
    return sorted(path.name for path in (folder / ".checkpoints").glob("*"))


def set_params(folder: Path, **changed: object) -> None:
    yaml = YAML()
    params = yaml.load(folder / "params.yaml")
    params["train"].update(changed)
    yaml.dump(params, folder / "params.yaml")


def make_workspace(folder: Path, prepared: Path, **changed: object) -> Path:
    """A folder to train in: parameters and data. Without dvc.yaml, MLflow is not even imported."""
    (folder / "data/prepared").mkdir(parents=True)
    for split in ("train", "valid"):
        shutil.copy(prepared / f"{split}.safetensors", folder / "data/prepared")
    shutil.copy(ROOT / "params.yaml", folder)
    set_params(folder, **{"epochs": EPOCHS, "device": "cpu", **changed})
    return folder


@pytest.fixture
def workspace(tmp_path: Path, prepared: Path) -> Path:
    return make_workspace(tmp_path / "workspace", prepared)


def test_curve_is_a_csv_with_exact_numbers(tmp_path: Path) -> None:
    curve = [Epoch(1, 1 / 3, 0.9, 0.1 + 0.2, 1.0), Epoch(2, 1e-7, 1.0, 2.5, 0.0)]
    write_curve(tmp_path / "bn.csv", curve)
    text = (tmp_path / "bn.csv").read_bytes().decode()
    assert text.startswith("epoch,train_loss,train_accuracy,valid_loss,valid_accuracy\n1,0.333")
    assert "\r" not in text
    rows = [
        Epoch(int(row.pop("epoch")), **{k: float(v) for k, v in row.items()})
        for row in csv.DictReader(text.splitlines())
    ]
    assert rows == curve


# --- the process of one network, here in this one -------------------------------------------------


Events = list[dict[str, Any]]
Work = Callable[..., tuple[int, Events, str]]


@pytest.fixture
def work(
    tmp_path: Path,
    prepared: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    deterministic: None,
) -> Work:
    """Run `main` for two epochs; return its status, what it told, and standard error."""
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.chdir(make_workspace(tmp_path / "workspace", prepared, epochs=2))

    def work(variant: str = "bn", **changed: object) -> tuple[int, Events, str]:
        set_params(Path.cwd(), **changed)
        stdout = os.dup(1)
        capfd.readouterr()
        try:
            status = stage.main(variant)
        finally:
            os.dup2(stdout, 1)
            os.close(stdout)
        out, err = capfd.readouterr()
        return status, [json.loads(line) for line in out.splitlines()], err

    return work


@pytest.mark.parametrize("variant", VARIANTS)
def test_process_tells_of_its_run_and_writes_its_files(variant: str, work: Work) -> None:
    status, (begun, *events), err = work(variant)
    assert (status, err) == (0, "")
    (checkpoint,) = Path.cwd().glob(f".checkpoints/{variant}-*.safetensors")
    assert begun == {
        "device": "cpu",
        "described": "cpu",
        "steps": STEPS,
        "epochs": 2,
        "checkpoint": str(checkpoint),
    }
    assert sum(event.get("taken", 0) for event in events) == 2 * STEPS
    rows = [event["row"] for event in events if "row" in event]
    assert [event["kept"] for event in events if "row" in event] == [1, 2]

    written = files(Path.cwd())
    assert written.keys() == OUTPUTS[variant]
    with Path(f"reports/curves/{variant}.csv").open() as stream:
        curve = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(stream)]
    assert curve == rows
    metrics = json.loads(written[f"reports/metrics/train-{variant}.json"])
    assert metrics == {"device": "cpu", "torch": version("torch"), **rows[-1]}


def test_weights_say_what_made_them(work: Work) -> None:
    work("bn", hidden=[8, 7], bn_momentum=0.3)
    checkpoint = load_checkpoint(Path("models/bn.safetensors"))
    assert checkpoint.architecture.widths == (784, 8, 7, 10)
    assert checkpoint.architecture.bn_momentum == 0.3
    asked = checkpoint.provenance.pop("params")
    assert checkpoint.provenance == {
        "variant": "bn",
        "train_sha256": digest(Path("data/prepared/train.safetensors")),
        "device": "cpu",
    }
    assert (asked["hidden"], asked["lr"]) == ([8, 7], 0.01)
    assert "device" not in asked  # auto and cpu make the same file


def test_resumed_process_writes_the_same_files(work: Work) -> None:
    work("bn", epochs=3)
    written = files(Path.cwd())
    (checkpoint,) = Path.cwd().glob(".checkpoints/*")
    set_params(Path.cwd(), device="auto")
    status, events, err = work("bn")  # as after a kill while the files were being written
    assert status == 0
    assert err == f"going on after epoch 3, from {checkpoint}\n"
    assert [event.get("kept") for event in events[1:]] == [None, 3] * 3
    assert files(Path.cwd()) == written


def test_loss_that_is_no_number_is_told_with_its_step(work: Work) -> None:
    for variant in VARIANTS:
        status, events, err = work(variant, lr=1e38)
        assert (status, err) == (1, "")
        assert events[-1] == {
            "error": "CheckFailedError",
            "message": "the loss is no longer finite in epoch 1, step 2 of 56 (lr 1e+38): "
            "lower train.lr in params.yaml",
        }
    assert files(Path.cwd()) == {}


def test_loss_that_is_no_number_later_leaves_the_last_good_checkpoint(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_steps = FusedTrainer.run
    losses = iter([1.0, 1.0, float("nan")])

    def diverging(trainer: FusedTrainer, order: Tensor, progress: Callable[[int], None]) -> Tensor:
        return run_steps(trainer, order, progress) * next(losses)

    monkeypatch.setattr(FusedTrainer, "run", diverging)
    status, events, _ = work("plain", epochs=4)
    assert status == 1
    assert "in epoch 3, step 1 of 56 (lr 0.01)" in events[-1]["message"]
    assert [event["kept"] for event in events if "kept" in event] == [1, 2]
    with safe_open(events[0]["checkpoint"], framework="pt") as stored:
        assert len(json.loads(stored.metadata()["mnist_batchnorm"])["rows"]) == 2


def spoil(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "no {path}; run `dvc repro prepare` first"),
        (spoil(b""), "{path} is not a prepared split: "),
        (spoil(b"\x80\x04K\x01."), "{path} is not a prepared split: "),
        (lambda path: os.truncate(path, 100_000), "{path} is not a prepared split: "),
    ],
    ids=["missing", "empty", "a pickle", "truncated"],
)
@pytest.mark.parametrize("split", ["train", "valid"])
def test_damaged_data_is_the_users_mistake(
    split: str, damage: Callable[[Path], object], message: str, work: Work
) -> None:
    path = Path(f"data/prepared/{split}.safetensors")
    damage(path)
    status, events, err = work()
    assert (status, err) == (1, "")
    (event,) = events
    assert event["error"] == "UserError"
    assert event["message"].startswith(message.format(path=path))
    assert files(Path.cwd()) == {}


def test_batch_larger_than_the_data_is_the_users_mistake(work: Work) -> None:
    status, events, _ = work(batch_size=1801)
    assert status == 1
    assert events == [
        {
            "error": "UserError",
            "message": "params.yaml: train.batch_size: 1801 is more than the 1800 training images",
        }
    ]


def test_gpu_that_is_not_there_is_the_users_mistake(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    status, (event,), _ = work(device="cuda")
    assert (status, event["error"]) == (1, "UserError")
    assert "train.device: cuda: this PyTorch" in event["message"]


def allocate_with_torch() -> None:
    torch.empty(2**45)  # more than an address space holds


def allocate_with_numpy() -> None:
    np.empty(2**45)


def run_out_on_a_gpu() -> None:
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.11 GiB"
    )


def run_out_in_python() -> None:
    raise MemoryError


@pytest.mark.parametrize(
    ("allocate", "reason"),
    [
        (
            allocate_with_torch,
            "can't allocate memory: you tried to allocate 140737488355328 bytes",
        ),
        (allocate_with_numpy, "Unable to allocate 256. TiB"),
        (run_out_on_a_gpu, "Tried to allocate 20.00 MiB"),
        (run_out_in_python, "MemoryError"),
    ],
)
def test_memory_that_runs_out_is_the_users_mistake(
    allocate: Callable[[], None], reason: str, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mnist_batchnorm.training.loop.fit", lambda *_, **__: allocate())
    status, events, err = work()
    assert (status, err) == (1, "")
    assert events[-1] == {
        "error": "UserError",
        "message": "not enough memory to train: lower train.batch_size, train.hidden or the number "
        "of seeds in "
        f"params.yaml ({reason})",
    }


@pytest.mark.parametrize("bug", [RuntimeError("shapes do not fit"), KeyError("x"), ValueError()])
def test_bug_keeps_its_traceback(
    bug: Exception, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(*_: object, **__: object) -> None:
        raise bug

    monkeypatch.setattr("mnist_batchnorm.training.loop.fit", fit)
    with pytest.raises(type(bug)):
        work()
    assert as_users_mistake(bug) is None


@pytest.mark.parametrize("error", [UserError("a"), CheckFailedError("b")])
def test_errors_with_a_meaning_keep_it(error: Exception) -> None:
    assert as_users_mistake(error) is error


def test_what_a_library_prints_is_no_event(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    def chatty() -> None:
        os.write(1, b"from C\n")

    monkeypatch.setattr("mnist_batchnorm.training.loop.make_deterministic", chatty)
    status, events, err = work()
    assert status == 0
    assert events[0]["epochs"] == 2
    assert err == "from C\n"


def test_process_whose_reader_is_gone_ends_quietly(
    work: Work, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    stdout = os.dup(1)
    os.dup2(writer, 1)
    os.close(writer)
    os.close(reader)
    try:
        assert stage.main("bn") == 1
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
    assert capfd.readouterr().err == ""
    assert files(Path.cwd()) == {}


def test_full_disk_for_the_outputs_leaves_no_half_file(
    work: Work, mount: Callable[[Path, str], None]
) -> None:
    work("bn")
    expected = files(Path.cwd())
    shutil.rmtree("models")
    mount(Path.cwd() / "models", "64k")  # the weights take 107
    status, events, err = work("bn")
    assert status == 1
    assert "going on after epoch 2" in err
    assert events[-1] == {"error": "UserError", "message": "[Errno 28] No space left on device"}
    assert list(Path("models").iterdir()) == []
    shutil.rmtree("reports")
    fill(Path("models"))
    assert work("bn")[0] == 1
    assert [path.name for path in Path("models").iterdir()] == ["filler"]
    assert not Path("reports").exists()
    os.system(f"mount -o remount,size=1m {Path.cwd() / 'models'}")
    Path("models/filler").unlink()
    assert work("bn")[0] == 0
    assert files(Path.cwd()) == expected


# --- the process that shows them, with other programs in the place of the networks' ---------------


@pytest.fixture
def stand_in(project: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Start these Python programs, one a network, instead of ours; MLflow's keeps what it gets.

    They know ``tell(**event)``, ``begin()`` and ``epoch(number)``.
    """
    monkeypatch.delenv("DVC_ROOT", raising=False)
    (project / ".checkpoints").mkdir()
    prelude = f"""
import json, os, signal, sys, time
from importlib.metadata import version
from pathlib import Path
variant = sys.argv[-1]
checkpoint = Path({str(project)!r}) / ".checkpoints" / (variant + "-0123.safetensors")
def tell(**event):
    os.write(1, json.dumps(event).encode() + b"\\n")
def begin(epochs=10):
    tell(device="cpu", described="cpu", steps=3, epochs=epochs, checkpoint=str(checkpoint))
def epoch(number):
    checkpoint.write_text(str(number))
    tell(taken=3)
    row = {{"epoch": number, "train_loss": 1 / number, "train_accuracy": 0.5}}
    tell(row=row | {{"valid_loss": 0.25, "valid_accuracy": 0.75}}, kept=number)
Path(variant + ".new").write_text(str(os.getpid()))
os.replace(variant + ".new", variant + ".pid")
"""
    (project / "mnist_batchnorm.mlflow_sync.live_child.py").write_text(
        "import sys\nwith open('received', 'w') as kept:\n    kept.writelines(sys.stdin)\n"
    )
    python = project / "python"
    python.write_text(
        "#!/bin/sh\n"
        "for last; do :; done\n"  # the last word is the network or, of MLflow's, the module
        f'exec "{sys.executable}" "$last.py" $last\n'
    )
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))

    def use(**programs: str) -> None:
        for variant, program in programs.items():
            (project / f"{variant}.py").write_text(prelude + program)

    return use


def received() -> list[tuple[str, object]]:
    """What MLflow's process was told: (network, epoch or status or device)."""
    lines = [json.loads(line) for line in Path("received").read_text().splitlines()]
    keys = ("epoch", "status", "device")
    return [(line["variant"], next(line[key] for key in keys if key in line)) for line in lines]


def pids() -> list[int]:
    return [int(Path(f"{variant}.pid").read_text()) for variant in VARIANTS]


def is_gone(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False


WELL = "begin(); epoch(1); epoch(2)"


def test_both_are_shown_recorded_and_their_checkpoints_removed(
    stand_in: Callable[..., None], mnist_bn: MnistBn
) -> None:
    half = Path(".checkpoints/.bn-0123.safetensors.0123456789abcdef.tmp")
    half.write_text("of a run that was killed")
    stand_in(bn=WELL, plain=f"while not Path('bn.pid').exists(): pass\ntime.sleep(0.3)\n{WELL}")
    done = mnist_bn("train")
    assert (done.status, done.out) == (0, "")
    shown = "epoch  1/10  train loss 1.0000 accuracy 0.5000  valid loss 0.2500 accuracy 0.7500"
    assert done.err.splitlines() == [
        "training bn on cpu",
        f"bn     {shown}",
        f"bn     {shown.replace(' 1/', ' 2/').replace('1.0000', '0.5000')}",
        "training plain on cpu",
        f"plain  {shown}",
        f"plain  {shown.replace(' 1/', ' 2/').replace('1.0000', '0.5000')}",
    ]
    assert received() == [
        (variant, told) for variant in VARIANTS for told in ("cpu", 1, 2, "FINISHED")
    ]
    assert kept(Path.cwd()) == []


def test_networks_are_trained_side_by_side(
    stand_in: Callable[..., None], mnist_bn: MnistBn
) -> None:
    meet = "begin(); other = {'bn': 'plain', 'plain': 'bn'}[variant]\n" + (
        "while not Path(other + '.pid').exists(): time.sleep(0.01)\n"
    )
    stand_in(bn=meet, plain=meet)
    assert mnist_bn("train").status == 0


@pytest.mark.parametrize(
    ("named", "trained"), [(["plain"], {"plain"}), (["bn", "bn"], {"bn"}), ([], {"bn", "plain"})]
)
def test_networks_that_are_named_are_trained_once(
    named: list[str], trained: set[str], stand_in: Callable[..., None], mnist_bn: MnistBn
) -> None:
    program = "begin()\nwith open('log', 'a') as log: log.write(variant + ' ')"
    stand_in(bn=program, plain=program)
    assert mnist_bn("train", *named).status == 0
    assert sorted(Path("log").read_text().split()) == sorted(trained)


FAILS = "begin(); epoch(1); epoch(2); tell(error='{error}', message='too bad'); sys.exit(1)"


@pytest.mark.parametrize(
    ("error", "status", "start"), [("CheckFailedError", 1, "FAILED"), ("UserError", 2, "error")]
)
def test_one_that_fails_does_not_stop_the_other_and_keeps_its_checkpoint(
    error: str, status: int, start: str, stand_in: Callable[..., None], mnist_bn: MnistBn
) -> None:
    later = "while not Path('.checkpoints/plain-0123.safetensors').exists(): time.sleep(0.01)\n"
    stand_in(
        bn=f"{later}time.sleep(0.3); {WELL}; Path('written').touch()",
        plain=FAILS.format(error=error),
    )
    done = mnist_bn("train")
    assert done.status == status
    path = Path.cwd() / ".checkpoints/plain-0123.safetensors"
    assert done.err.splitlines()[-1] == (
        f"{start}: plain: too bad; plain goes on after epoch 2, from {path}"
    )
    assert Path("written").exists()
    # the other's too: run again, the command goes through both
    assert kept(Path.cwd()) == ["bn-0123.safetensors", "plain-0123.safetensors"]
    assert set(received()) >= {("plain", "FAILED"), ("bn", "FINISHED")}


def test_failures_of_both_are_told_and_the_graver_decides(
    stand_in: Callable[..., None], mnist_bn: MnistBn
) -> None:
    stand_in(
        bn="begin(); tell(error='UserError', message='no data'); sys.exit(1)",
        plain="begin(); tell(error='CheckFailedError', message='loss is nan'); sys.exit(1)",
    )
    done = mnist_bn("train")
    assert done.status == 1
    assert done.err.splitlines()[-2:] == ["FAILED: bn: no data", "plain: loss is nan"]


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            "its process was ended by SIGKILL, as the system does when memory runs out",
        ),
        ("os.kill(os.getpid(), signal.SIGBUS)", "its process was ended by SIGBUS"),
        ("sys.exit(3)", "its process ended with status 3"),
        ("1 / 0", "its process ended with status 1"),
        ("os.write(1, b'{\"taken\": '); sys.exit(4)", "its process ended with status 4"),
    ],
    ids=["killed", "crashed", "status", "traceback", "cut off"],
)
@pytest.mark.parametrize("epochs", [0, 1])
def test_process_that_is_ended_is_named_with_where_it_goes_on(
    end: str, reason: str, epochs: int, stand_in: Callable[..., None], mnist_bn: MnistBn
) -> None:
    stand_in(bn=f"begin(); {'epoch(1); ' * epochs}{end}", plain=WELL)
    done = mnist_bn("train")
    assert done.status == 1
    where = f"; bn goes on after epoch 1, from {Path.cwd()}/.checkpoints/bn-0123.safetensors"
    assert done.err.splitlines()[-1] == f"FAILED: bn: {reason}{where if epochs else ''}"
    assert ("bn", "FAILED") in received()


def test_process_that_is_ended_before_it_has_begun_is_named(
    stand_in: Callable[..., None], mnist_bn: MnistBn
) -> None:
    stand_in(bn="os.kill(os.getpid(), signal.SIGSEGV)")
    done = mnist_bn("train", "bn")
    assert (done.status, done.err) == (1, "FAILED: bn: its process was ended by SIGSEGV\n")
    assert received() == []


def test_torrent_of_events_in_pieces_arrives(
    stand_in: Callable[..., None], mnist_bn: MnistBn
) -> None:
    program = """
begin(epochs=500)
events, os.write, write = [], lambda _, event: events.append(event), os.write
for number in range(1, 501): epoch(number)
text = b"".join(events)
for start in range(0, len(text), 777): write(1, text[start:start + 777])
"""
    stand_in(bn=program, plain=program)
    done = mnist_bn("train")
    assert done.status == 0
    assert len(done.err.splitlines()) == 2 * 501
    for variant in VARIANTS:
        rows = [told for name, told in received() if name == variant]
        assert rows == ["cpu", *range(1, 501), "FINISHED"]


INTERRUPT = "os.kill(os.getppid(), signal.SIGINT)"


@pytest.mark.parametrize("stubborn", [False, True])
def test_ctrl_c_stops_both_and_says_where_each_goes_on(
    stubborn: bool, stand_in: Callable[..., None], mnist_bn: MnistBn
) -> None:
    ignore = "signal.signal(signal.SIGINT, signal.SIG_IGN); " if stubborn else ""
    met = "while not Path('bn.pid').exists(): time.sleep(0.01)\n"
    stand_in(
        bn=f"{ignore}begin(); epoch(1); epoch(2); time.sleep(60)",
        plain=f"{met}{ignore}begin(); time.sleep(0.5); {INTERRUPT}; time.sleep(60)",
    )
    start = time.monotonic()
    done = mnist_bn("train")
    assert time.monotonic() - start < 10
    assert done.status == 130
    path = Path.cwd() / ".checkpoints/bn-0123.safetensors"
    assert [line for line in done.err.splitlines() if line][-3:] == [
        f"bn goes on after epoch 2, from {path}",
        "plain has no whole epoch yet",
        "interrupted",
    ]
    assert all(map(is_gone, pids()))
    assert {("bn", "KILLED"), ("plain", "KILLED")} <= set(received())
    assert kept(Path.cwd()) == ["bn-0123.safetensors"]


def test_ctrl_c_at_the_start_says_that_nothing_had_begun(
    stand_in: Callable[..., None], mnist_bn: MnistBn
) -> None:
    stand_in(bn=f"{INTERRUPT}; time.sleep(60)")
    done = mnist_bn("train", "bn")
    assert done.status == 130
    assert "bn had not begun\n" in done.err


def test_error_in_showing_leaves_no_process_behind(
    stand_in: Callable[..., None], mnist_bn: MnistBn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")  # the terminal

    monkeypatch.setattr(tqdm, "write", gone)
    program = "begin(); time.sleep(60)"
    stand_in(bn=program, plain=program)
    done = mnist_bn("train")
    assert (done.status, done.err) == (2, "error: [Errno 5] Input/output error\n")
    for variant in VARIANTS:
        pid = Path(f"{variant}.pid")
        assert not pid.exists() or is_gone(int(pid.read_text()))


def test_mistake_in_the_parameters_is_told_once_before_anything_starts(
    stand_in: Callable[..., None], mnist_bn: MnistBn
) -> None:
    stand_in(bn=WELL, plain=WELL)
    set_params(Path.cwd(), lr=-1)
    done = mnist_bn("train")
    assert done.status == 2
    assert done.err.count("train.lr") == 1
    assert not Path("bn.pid").exists()


# --- the command as users run it ------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, prepared: Path
) -> tuple[Files, Path, str]:
    """A run to its end: its files, its folder and what it wrote to standard error."""
    folder = make_workspace(tmp_path_factory.mktemp("undisturbed") / "workspace", prepared)
    status, err = run(folder, sys.executable, "-c", TELL_IMPORTS, "train")
    assert status == 0, err
    return files(folder), folder, err


@pytest.fixture
def expected(undisturbed: tuple[Files, Path, str]) -> Files:
    return undisturbed[0]


def test_command_writes_the_six_files_and_leaves_nothing_else(
    undisturbed: tuple[Files, Path, str],
) -> None:
    written, folder, err = undisturbed
    assert written.keys() == OUTPUTS["bn"] | OUTPUTS["plain"]
    assert kept(folder) == []
    for variant in VARIANTS:
        assert f"training {variant} on cpu\n" in err
        rows = re.findall(rf"^{variant:5}  epoch (..)/{EPOCHS}  train loss \d", err, re.MULTILINE)
        assert [int(row) for row in rows] == list(range(1, EPOCHS + 1))
    assert "step" not in err  # no bar where nobody looks
    metrics = json.loads(written["reports/metrics/train-bn.json"])
    assert metrics["epoch"] == EPOCHS
    assert metrics["valid_accuracy"] > 0.85


def test_process_that_shows_imports_nothing_heavy(undisturbed: tuple[Files, Path, str]) -> None:
    modules = set(undisturbed[2].splitlines()[-1].split())
    assert "mnist_batchnorm.stages.train" in modules
    assert not modules & {"torch", "mlflow", "numpy", "safetensors", "dvc", "pandas"}


def at_epoch(number: int, variant: str = "bn") -> Callable[[Command], bool]:
    line = re.compile(rf"^{variant:5}  epoch +{number}/", re.MULTILINE)
    return lambda command: bool(line.search(command.err))


def goes_on_to(expected: Files, folder: Path, *words: str) -> str:
    """Run the command again and check that nothing shows that it had been disturbed."""
    status, err = run(folder, *(words or TRAIN))
    assert status == 0, err
    assert files(folder) == expected
    assert kept(folder) == []
    return err


def check_interrupted(command: Command, folder: Path, epoch: int) -> None:
    assert command.wait() == 130
    said = re.search(r"^bn goes on after epoch (\d+), from (.*)$", command.err, re.MULTILINE)
    assert said, command.err
    assert int(said[1]) >= epoch
    assert Path(said[2]).parent == folder / ".checkpoints"
    assert Path(said[2]).exists()
    assert re.search(r"^plain (goes on after|has no whole|had not)", command.err, re.MULTILINE)
    assert command.err.endswith("interrupted\n")
    assert "Traceback" not in command.err
    assert command.processes() == []


def check_lost(command: Command, folder: Path, variant: str, epoch: int) -> None:
    assert command.wait() == 1
    said = re.search(
        rf"^FAILED: {variant}: its process was ended by SIGKILL, as the system does when memory "
        rf"runs out; {variant} goes on after epoch (\d+), from (.*)$",
        command.err,
        re.MULTILINE,
    )
    assert said, command.err
    assert int(said[1]) >= epoch
    assert Path(said[2]).parent == folder / ".checkpoints"
    assert Path(said[2]).exists()
    assert command.processes() == []


def test_command_that_is_interrupted_and_then_loses_a_process_ends_with_the_same_bytes(
    workspace: Path, expected: Files
) -> None:
    with running(workspace, *TRAIN) as command:
        command.until(at_epoch(3))
        os.killpg(command.process.pid, signal.SIGINT)  # as a terminal does
        check_interrupted(command, workspace, 3)
    with running(workspace, *TRAIN) as command:
        command.until(at_epoch(5))
        assert re.search(r"going on after epoch \d+, from .*/\.checkpoints/bn-", command.err)
        kill(*command.processes("bn"))
        check_lost(command, workspace, "bn", 5)
    written = files(workspace)
    assert written.keys() >= OUTPUTS["plain"]
    assert written.items() <= expected.items()  # the other may have been about to end
    goes_on_to(expected, workspace)


@pytest.fixture
def tracked(workspace: Path) -> Path:
    """A workspace whose runs an MLflow store takes."""
    (workspace / "dvc.yaml").write_text(store.DVC_YAML)
    (workspace / "train.py").write_text("print('train')\n")
    (workspace / "mlflow.db").write_bytes(store.empty_database())
    return workspace


def on_a_terminal(folder: Path, *words: str, **variables: str) -> tuple[int, str]:
    """Run a command as `run` does, on a terminal: return what that shows."""
    master, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 120))
    with running(folder, *words, env=environment(**variables), terminal=terminal) as command:
        os.close(terminal)
        shown = b""
        while True:
            try:
                chunk = os.read(master, 1 << 16)
            except OSError:  # Linux's end of file, when nobody has it open any more
                break
            if not chunk:
                break
            shown += chunk
        os.close(master)
        return command.wait(), shown.decode()


def test_one_network_on_a_terminal_has_the_same_bytes_and_a_bar(
    workspace: Path, expected: Files
) -> None:
    status, shown = on_a_terminal(workspace, *TRAIN, "bn")
    assert status == 0, shown
    assert f"{EPOCHS * STEPS}/{EPOCHS * STEPS} [" in shown  # the bar, at its end
    assert "step/s]" in shown
    assert files(workspace) == of("bn", expected)
    assert kept(workspace) == []


@pytest.mark.slow
def test_tracked_command_on_a_terminal_has_the_same_bytes(tracked: Path, expected: Files) -> None:
    status, shown = on_a_terminal(tracked, *TRAIN)
    assert status == 0, shown
    assert f"{2 * EPOCHS * STEPS}/{2 * EPOCHS * STEPS} [" in shown
    assert files(tracked) == expected
    assert kept(tracked) == []
    if "MLflow does not have all of this yet" not in shown:  # on a machine that is not too busy
        recorded = {run.data.params["variant"]: run for run in store.all_runs(tracked)}
        assert recorded.keys() == {*VARIANTS}
        for one in recorded.values():
            assert one.info.status == "FINISHED"
            steps = [step for step, _ in store.history(tracked, one, "curves/train_loss")]
            assert steps == list(range(1, EPOCHS + 1))


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_network_alone_has_the_bytes_of_both(
    variant: str, workspace: Path, expected: Files
) -> None:
    status, err = run(workspace, *TRAIN, variant)
    assert status == 0, err
    assert files(workspace) == of(variant, expected)


@pytest.mark.slow
@pytest.mark.parametrize("server", store.BAD_SERVERS)
def test_bad_server_and_bar_change_no_byte(
    server: Callable[[], AbstractContextManager[str]], tracked: Path, expected: Files
) -> None:
    with server() as uri:
        start = time.monotonic()
        status, shown = on_a_terminal(tracked, *TRAIN, MLFLOW_TRACKING_URI=uri)
    assert status == 0, shown
    assert "MLflow does not have all of this yet" in shown
    assert files(tracked) == expected
    assert time.monotonic() - start < 60


@pytest.mark.slow
def test_ctrl_c_of_the_command_alone_ends_all_too(workspace: Path, expected: Files) -> None:
    with running(workspace, *TRAIN) as command:
        command.until(at_epoch(5))
        command.process.send_signal(signal.SIGINT)
        check_interrupted(command, workspace, 5)
    goes_on_to(expected, workspace)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.4, 0.7, 1.0, 1.5, 2.0, 2.5])
def test_ctrl_c_while_it_starts_shows_no_traceback(
    seconds: float, workspace: Path, expected: Files
) -> None:
    with running(workspace, *TRAIN) as command:
        command.until(lambda command: bool(command.processes("bn")))
        time.sleep(seconds)
        os.killpg(command.process.pid, signal.SIGINT)
        assert command.wait() == 130
        assert "Traceback" not in command.err
        assert command.processes() == []
    goes_on_to(expected, workspace)


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [False, True])
def test_networks_whose_command_is_killed_end_by_themselves(
    at_once: bool, workspace: Path, expected: Files
) -> None:
    with running(workspace, *TRAIN) as command:
        command.until(at_epoch(4))
        kill(command.process.pid)
        assert command.wait() == -signal.SIGKILL
        assert at_once or command.gone()
        goes_on_to(expected, workspace)
        assert command.gone()
    assert "Traceback" not in command.err
    assert kept(workspace) == []


@pytest.mark.slow
def test_loss_that_is_no_number_fails_the_command(workspace: Path) -> None:
    set_params(workspace, lr=1e38)
    status, err = run(workspace, *TRAIN)
    assert status == 1
    why = (
        "the loss is no longer finite in epoch 1, step 2 of 56 (lr 1e+38): "
        "lower train.lr in params.yaml"
    )
    assert f"FAILED: bn: {why}\nplain: {why}\n" in err
    assert files(workspace) == {}
    assert kept(workspace) == []


@pytest.mark.slow
def test_disk_without_room_for_the_weights_is_the_users_mistake(
    workspace: Path, expected: Files, mount: Callable[[Path, str], None]
) -> None:
    mount(workspace / "models", "128k")  # for one of the two
    status, err = run(workspace, *TRAIN)
    assert status == 2, err
    said = re.search(
        r"^error: (bn|plain): \[Errno 28\] No space left on device; \1 goes on after epoch 60, ",
        err,
        re.MULTILINE,
    )
    assert said, err
    (other,) = {*VARIANTS} - {said[1]}
    assert files(workspace) == of(other, expected)
    os.system(f"mount -o remount,size=1m {workspace / 'models'}")
    goes_on_to(expected, workspace)


@pytest.mark.slow
def test_two_commands_at_once_write_the_same_bytes(workspace: Path, expected: Files) -> None:
    with running(workspace, *TRAIN) as one, running(workspace, *TRAIN) as other:
        assert (one.wait(), other.wait()) == (0, 0), one.err + other.err
    assert files(workspace) == expected
    assert kept(workspace) == []


# --- real kills, at any moment --------------------------------------------------------------------


KILLS = 4  # in each of the tests below, before the run that is let be


def temporary(folder: Path) -> set[str]:
    """Files that are being written at this moment."""
    return {path.name for path in folder.glob(".*.tmp")}


def checkpoint_being_written(folder: Path, number: int) -> Callable[[Command], bool]:
    """The number-th time that one is seen."""
    seen: set[str] = temporary(folder / ".checkpoints")
    before = len(seen)

    def written(_: Command) -> bool:
        seen.update(temporary(folder / ".checkpoints"))
        return len(seen) >= before + number

    return written


def checkpoint_written(folder: Path, number: int) -> Callable[[Command], bool]:
    """The number-th time that one has taken the place of the one before."""
    seen: set[tuple[str, int]] = set()

    def written(_: Command) -> bool:
        for path in (folder / ".checkpoints").glob("*.safetensors"):
            with suppress(FileNotFoundError):  # removed: the run has ended
                seen.add((path.name, path.stat().st_ino))
        return len(seen) >= number

    return written


def outputs_being_written(folder: Path, _: int) -> Callable[[Command], bool]:
    places = ("models", "reports/curves", "reports/metrics")
    before = {place: temporary(folder / place) for place in places}
    return lambda _: any(temporary(folder / place) - before[place] for place in places)


def after(seconds: float) -> Callable[[Command], bool]:
    deadline = time.monotonic() + seconds
    return lambda _: time.monotonic() >= deadline


WATCHED = [checkpoint_being_written, checkpoint_written, outputs_being_written]


def strike(
    command: Command, moment: Callable[[Command], bool], victims: str, generator: random.Random
) -> bool:
    """Kill at a moment; return whether there was anything left to kill."""
    known, refreshed = [command.process.pid], 0.0
    while not moment(command):
        if command.process.poll() is not None:
            return False
        if time.monotonic() - refreshed > 0.05:  # so that the kill itself comes at once
            known, refreshed = command.processes(), time.monotonic()
    if command.process.poll() is not None:
        return False
    generator.shuffle(known)
    if victims == "all":
        # the command first, lest it see the others end: DVC would then rewrite its lock file in
        # place, and a kill on the way leaves it one that it cannot read
        kill(command.process.pid, *known)
        command.kill()
    elif victims == "command":
        kill(command.process.pid)
        command.process.wait()
    else:
        workers = command.processes("mnist_batchnorm.stages.train")
        kill(*generator.sample(workers, min(1, len(workers))))
        command.wait()
    return True


@pytest.fixture(scope="module")
def duration(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> float:
    """Seconds of an undisturbed run, on this machine, as busy as it is."""
    folder = make_workspace(tmp_path_factory.mktemp("duration") / "workspace", prepared)
    start = time.monotonic()
    assert run(folder, *TRAIN)[0] == 0
    return time.monotonic() - start


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_kills_at_any_moment_change_no_byte(
    seed: int, workspace: Path, expected: Files, duration: float
) -> None:
    generator = random.Random(seed)
    kills = 0
    with ExitStack() as started:
        while kills < KILLS:
            if generator.random() < 0.5:
                moment = after(generator.uniform(0.0, duration))
            else:
                moment = generator.choice(WATCHED)(workspace, generator.randint(1, 8))
            victims = generator.choice(["all", "all", "all", "command", "worker"])
            command = started.enter_context(running(workspace, *TRAIN))
            kills += strike(command, moment, victims, generator)  # it may have ended before
            for name, content in files(workspace).items():
                assert name.endswith(".tmp") or content == expected[name], name
        status, err = run(workspace, *TRAIN)
    assert status == 0, err
    written = files(workspace)
    half = {name for name in written if name.endswith(".tmp")}  # no run takes them for a file
    assert {name: written[name] for name in written.keys() - half} == expected
    assert kept(workspace) == []


@pytest.mark.slow
def test_kills_of_dvc_change_no_byte(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    project = make_project(tmp_path / "undisturbed/project")
    set_params(project.folder, epochs=EPOCHS)
    project.check("dvc", "repro", "prepare")
    disturbed = Project(tmp_path / "disturbed/project")
    shutil.copytree(project.folder.parent, disturbed.folder.parent, symlinks=True)
    project.check("dvc", "repro", "train")
    # not what a killed writer leaves: .bn.csv.0123456789abcdef.tmp
    patterns = ("dvc.lock", "models/[!.]*", "reports/metrics/train-*", "reports/curves/[!.]*")
    expected = project.hashes(*patterns)
    assert len(expected) == 7

    generator = random.Random(0)
    moments = [
        at_epoch(3),
        checkpoint_being_written(disturbed.folder, 5),
        at_epoch(12, "plain"),
        outputs_being_written(disturbed.folder, 1),
    ]
    for moment in moments:
        words = ("dvc", "repro", "train")
        with running(disturbed.folder, *words, env=disturbed.environment) as command:
            assert strike(command, moment, "all", generator), command.err
    output = disturbed.check("dvc", "repro", "train")
    assert "going on after epoch" in output
    assert disturbed.hashes(*patterns) == expected
    assert kept(disturbed.folder) == []

    disturbed.check("dvc", "repro", "train")  # has nothing to do
    client = MlflowClient(f"sqlite:///{disturbed.folder / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'mnist-batchnorm'")
    recorded = client.search_runs([experiment.experiment_id])
    assert sorted(run.data.params["variant"] for run in recorded) == ["bn", "plain"]
    for one in recorded:
        points = client.get_metric_history(one.info.run_id, "curves/train_loss")
        steps = sorted(point.step for point in points)
        assert len(steps) == len(set(steps))
