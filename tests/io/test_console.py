"""Only rank 0 prints, and the output of libraries is written to the log."""

import os
import subprocess
import sys
import time
import warnings

import pytest

from dsrecipes.io.console import Console


def test_noise_is_logged_and_messages_are_shown(tmp_path, capfd):
    console = Console(capture=True)
    print("noise of Python")
    os.write(2, b"noise of C\n")
    console.log_to(tmp_path / "log.txt")
    warnings.warn("noise of warnings", stacklevel=1)
    print("later noise", file=sys.__stderr__, flush=True)
    console.say("hello")
    with console.progress("counting", total=3) as bar:
        bar.update(3)
    console.release()
    print("mine again")
    out, err = capfd.readouterr()
    log = (tmp_path / "log.txt").read_text()
    assert "noise of C" in log and "later noise" in log and "hello" not in log
    assert "hello" in out and "counting" in out and "3/3" in out and "mine again" in out
    assert "noise" not in err and "noise of C" not in out


def test_other_ranks_print_nothing(tmp_path, capfd):
    console = Console(main=False, capture=True)
    console.say("hello")
    with console.progress("counting", total=3) as bar:
        bar.update(3)
    console.log_to(tmp_path / "log.txt")
    console.release()
    console.release()
    assert capfd.readouterr() == ("", "")


def test_an_error_is_printed_below_an_open_bar(capfd):
    console = Console(capture=True)
    console.progress("counting", total=3)
    console.release()
    print("error: no luck", file=sys.stderr)
    console = Console()
    console.bars = False
    console.progress("unwanted", total=3).close()
    out, err = capfd.readouterr()
    assert out.endswith("\n") and "counting" in out and err == "error: no luck\n" and "unwanted" not in out


@pytest.mark.parametrize("rank", [0, 1])
def test_verbose_hides_nothing_and_keeps_a_log_per_rank(tmp_path, rank):
    code = (
        "import os, sys; from pathlib import Path; from dsrecipes.io.console import Console\n"
        f"c = Console(main={rank} == 0, rank_logs={rank}); c.log_to(Path(sys.argv[1]) / 'log.txt')\n"
        "os.write(1, b'from C\\n'); print('from Python', flush=True); c.say('words')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    log = tmp_path / "logs" / f"rank_{rank}.log"
    for _ in range(100):  # tee is a separate process
        if log.is_file() and "from Python" in log.read_text():
            break
        time.sleep(0.05)
    assert done.returncode == 0 and "from C" in log.read_text() and "from Python" in log.read_text()
    assert ("words" in done.stdout) == (rank == 0)


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("early", [True, False])
def test_a_run_continues_when_its_reader_ends(tmp_path, capture, early):
    code = (
        "import os, sys, time; from pathlib import Path; from dsrecipes.io.console import Console\n"
        f"capture = {capture}; c = Console(capture=capture, rank_logs=None if capture else 0); log = Path(sys.argv[1]) / 'log.txt'\n"
        "def reader_ends():\n"
        "    sys.stdin.readline(); c.say('nobody reads this'); print('noise', flush=True)\n"
        "c.say('first'); EARLY and reader_ends(); c.log_to(log); EARLY or reader_ends()\n"
        "bar = c.progress('counting', total=3); bar.update(3); c.say('last'); os.write(2, b'from C\\n'); c.release()\n"
        "print('after', flush=True); print('error', file=sys.stderr, flush=True)"
    ).replace("EARLY", str(early))
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, bufsize=1,
    )  # fmt: skip
    assert process.stdout.readline() == "first\n"
    process.stdout.close()
    process.stdin.write("continue\n")
    process.stdin.close()
    assert process.wait(30) == 0
    log = tmp_path / ("log.txt" if capture else "logs/rank_0.log")
    expected = ["counting", "last", "from C"] + ["nobody reads this", "noise"] * (capture or not early)
    for _ in range(100):  # tee is a separate process
        if log.is_file() and all(part in log.read_text() for part in expected):
            break
        time.sleep(0.05)
    assert all(part in log.read_text() for part in expected), log.read_text()
