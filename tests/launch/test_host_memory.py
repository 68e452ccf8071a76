"""Whether memory ran out, from the files in which the kernel counts."""

from pathlib import Path

from dsrecipes.launch.host_memory import HostMemory


def group(folder: Path, **files: object) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / f"memory.{name}").write_text(f"{text}\n")
    return folder


def test_a_limit_that_was_nearly_reached_or_killed_for_is_memory_that_ran_out(tmp_path: Path):
    inner = group(tmp_path / "inner", max=8_000_000_000, peak=4_000_000_000, events="low 0\noom 0\noom_kill 2")
    outer = group(tmp_path / "outer", limit_in_bytes=16_000_000_000, max_usage_in_bytes=15_900_000_000)
    memory = HostMemory([inner, outer])
    ran_out, figures = memory.report()
    assert not ran_out and f"the control group {inner} has a limit of 8.0 GB, of which 4.0 GB were used" in figures
    group(inner, peak=7_900_000_000)
    assert memory.report()[0]
    group(inner, peak=4_000_000_000, events="low 0\noom 1\noom_kill 3")
    ran_out, figures = memory.report()
    assert ran_out and "the kernel has killed a process for memory since the start" in figures


def test_version_one_of_control_groups_writes_no_limit_as_a_number(tmp_path: Path):
    memory = HostMemory([group(tmp_path / "free", limit_in_bytes=9223372036854771712, max_usage_in_bytes=10**12)])
    ran_out, figures = memory.report()
    assert not ran_out and "control group" not in figures


def test_this_machine_has_memory():
    memory = HostMemory()
    assert memory.least_free and not memory.report()[0] and "GB were free" in memory.report()[1]
    memory.least_free = 0
    assert memory.report()[0]
