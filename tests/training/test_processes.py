"""The parent of the training processes, with small programs in place of the workers."""

import json
import os
import pty
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tqdm import tqdm

from mnist_batchnorm.core.paths import VARIANTS
from tests.conftest import MnistBn
from tests.support.training import (
    kept,
    set_params,
)


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


def test_terminal_shows_a_bar(
    stand_in: Callable[..., None], mnist_bn: MnistBn, monkeypatch: pytest.MonkeyPatch
) -> None:
    master, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 120))
    stand_in(bn="begin(epochs=2); epoch(1); epoch(2)")
    with os.fdopen(terminal, "w") as screen, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", screen)
        assert mnist_bn("train", "bn").status == 0
        shown = os.read(master, 1 << 16).decode()
    os.close(master)
    assert "6/6 [" in shown  # the bar, at its end
    assert "step/s]" in shown
    assert "bn     epoch 2/2  train loss 0.5000" in shown


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
