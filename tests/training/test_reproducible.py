"""A reproducible training has the same bits on every processor with AVX2."""

import os
import platform
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.params import parse_params
from mnist_batchnorm.training import reproducible as module
from tests.conftest import ROOT

X86 = pytest.mark.skipif(
    platform.machine() != "x86_64" or not torch.cpu._is_avx2_supported(),
    reason="a reproducible training needs an x86-64 processor with AVX2",
)

# 40 steps of both networks by the fused step, then the weights' SHA-256
PROGRAM = """
    import hashlib
    from mnist_batchnorm.training.reproducible import make_reproducible
    make_reproducible()
    import torch
    from mnist_batchnorm.training.fused import FusedTrainer
    from mnist_batchnorm.training.devices import make_deterministic
    from mnist_batchnorm.network.model import Architecture
    make_deterministic()
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (256, 784), generator=generator).float() / 255
    labels = torch.randint(0, 10, (256,), generator=generator)
    order = torch.randint(0, 256, (1, 40, 32), generator=generator)
    for batch_norm in (True, False):
        model = Architecture((784, 32, 32, 10), batch_norm).build(0)
        FusedTrainer([model], images, labels, 32, 0.01).run(order)
        content = b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())
        print(hashlib.sha256(content).hexdigest())
"""
# what it prints with this PyTorch, wherever; another release may round in another way
TORCH = "2.15.0"
GOLDEN = [
    "f60c01458058d44e2cbcba7b85028361ce14017c23be3e036c368d04c1721871",
    "0db5efbfb1c4eae1221b3a8a041044eca27e4b4fe2e712da9f9360558b25b81f",
]


def trained(*emulator: str, settings: Mapping[str, str] | None = None) -> list[str]:
    program = textwrap.dedent(PROGRAM)
    if settings is not None:  # in the place of the portable ones
        program = program.replace("\nmake_reproducible()\n", "\n")
    done = subprocess.run(
        [*emulator, sys.executable, "-W", "ignore", "-c", program],
        env={**os.environ, **(settings or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@X86
@pytest.mark.skipif(not torch.__version__.startswith(TORCH), reason=f"golden of torch {TORCH}")
def test_bits_are_those_of_any_other_machine() -> None:
    assert trained() == GOLDEN


@X86
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="needs qemu-x86_64 (qemu-user)")
@pytest.mark.parametrize("processor", ["Haswell-v4", "EPYC-Rome-v2"])
def test_processor_without_avx512_computes_the_same_bits(processor: str) -> None:
    assert trained("qemu-x86_64", "-cpu", processor) == trained()


@X86
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="needs qemu-x86_64 (qemu-user)")
def test_without_it_processors_differ() -> None:
    # else the tests above could not fail
    intel, amd = (
        trained("qemu-x86_64", "-cpu", processor, settings={})
        for processor in ("Haswell-v4", "EPYC-Rome-v2")
    )
    assert intel != amd


@X86
@pytest.mark.slow
@pytest.mark.parametrize("name", module.SETTINGS)
def test_each_setting_decides_bits(name: str) -> None:
    others = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "AUTO"}
    changed = module.SETTINGS | {name: others[name]}
    assert trained(settings=changed) != trained(settings=module.SETTINGS)


STAND_IN = """
class cpu:
    _is_avx2_supported = staticmethod(lambda: {avx2})
class backends:
    class mkl:
        is_available = staticmethod(lambda: {mkl})
__version__ = "2.15.0+cpu"
"""


@pytest.mark.parametrize(
    ("machine", "avx2", "mkl", "message"),
    [
        ("x86_64", True, True, ""),
        ("x86_64", False, True, "this processor has no AVX2; set it to false"),
        ("x86_64", True, False, "PyTorch 2.15.0+cpu here is a build without MKL; set it to false"),
        ("aarch64", True, True, "this processor is aarch64, not x86-64; set it to false"),
    ],
)
def test_unsupported_machine_is_named(
    machine: str, avx2: bool, mkl: bool, message: str, tmp_path: Path
) -> None:
    (tmp_path / "torch.py").write_text(STAND_IN.format(avx2=avx2, mkl=mkl))
    program = f"""
        import platform, sys
        sys.path.insert(0, {str(tmp_path)!r})
        platform.machine = lambda: {machine!r}
        from mnist_batchnorm.core.errors import UserError
        from mnist_batchnorm.training.reproducible import make_reproducible
        try:
            make_reproducible()
        except UserError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True
    )
    expected = f"params.yaml: train.portable: {message}\n" if message else ""
    assert done.stdout == expected


def test_settings_must_precede_the_import_of_torch() -> None:
    with pytest.raises(RuntimeError, match="imported already"):
        module.make_reproducible()


def test_gpu_and_portable_contradict_each_other() -> None:
    text = (ROOT / "params.yaml").read_text()
    text = text.replace("portable: false", "portable: true").replace("device: auto", "device: cuda")
    with pytest.raises(UserError, match=r"train: portable is for the CPU; .*cpu or auto"):
        parse_params(text)
