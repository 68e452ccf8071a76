"""GPUs are counted by the drivers' listing, without importing torch."""

import sys

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
