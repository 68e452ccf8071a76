"""GPUs are counted by the drivers' listing, without importing torch."""

import sys

import pytest

from dsrecipes.io import devices
from dsrecipes.io.devices import accelerators


def test_accelerators_are_counted_without_torch(tmp_path, monkeypatch):
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 'GPU 0: X (UUID: a)'\necho 'GPU 1: X (UUID: b)'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert accelerators() == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert accelerators() == 1
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with fake.open("a") as file:
        file.write("echo '  MIG 1g.10gb     Device  0: (UUID: MIG-c)'\necho '  MIG 1g.10gb     Device  1: (UUID: MIG-d)'\n")
    assert accelerators() == 1  # CUDA gives a process one instance


@pytest.mark.parametrize(
    ("rocr", "hip", "cuda", "count"),
    [
        (None, None, None, 4),
        (None, "0,2", None, 2),
        ("GPU-a,GPU-b,GPU-c", None, None, 3),
        ("0,1,2", "1", None, 1),
        ("0", "0,1", None, 1),
        (None, "0,1,2", "0,1", 2),
        (None, "0,1,2,3,4,5", None, 4),
        ("", None, None, 0),
        (None, "-1", None, 0),
        (None, None, "", 0),
    ],
)
def test_variables_hide_amd_gpus(tmp_path, monkeypatch, rocr, hip, cuda, count):
    (tmp_path / "dri").mkdir()
    for name in ("kfd", "dri/card0", *(f"dri/renderD{number}" for number in range(128, 132))):
        (tmp_path / name).touch()
    monkeypatch.setattr(devices, "_DEVICES", tmp_path)
    # no nvidia-smi
    monkeypatch.setenv("PATH", str(tmp_path))
    for prefix, value in (("ROCR", rocr), ("HIP", hip), ("CUDA", cuda)):
        monkeypatch.delenv(f"{prefix}_VISIBLE_DEVICES", raising=False)
        if value is not None:
            monkeypatch.setenv(f"{prefix}_VISIBLE_DEVICES", value)
    assert devices.listed_accelerators() == count
