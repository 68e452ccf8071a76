"""Signals and a time limit: when a run stops, and what stays ignored."""

import os
import signal
import subprocess
import sys
import time

import pytest

from dsrecipes.config.values import seconds_of
from dsrecipes.errors import UserError
from dsrecipes.launch.environment import START_TIME
from dsrecipes.launch.signals import StopSignals


def send(number: int) -> None:
    """Send this process a signal, and let its handler run."""
    os.kill(os.getpid(), number)
    time.sleep(0.01)


@pytest.mark.parametrize(
    ("number", "reason"),
    [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C"), (signal.SIGHUP, "the terminal was closed")],
)
def test_a_signal_stops_the_run(number, reason):
    before = signal.getsignal(number)
    with StopSignals(None) as signals:
        signals.sync()
        assert not signals.leaving
        send(number)
        assert not signals.leaving, "only once all ranks agreed"
        signals.sync()
        assert signals.leaving and reason in signals.reason
    assert signal.getsignal(number) is before


def test_sigusr1_requests_one_save():
    with StopSignals(None) as signals:
        send(signal.SIGUSR1)
        signals.sync()
        assert signals.saving and not signals.leaving
        signals.saving = False
        signals.sync()
        assert not signals.saving


def test_ctrl_c_twice_stops_at_once_but_a_signal_delivered_twice_does_not():
    with StopSignals(None) as signals:
        send(signal.SIGINT), send(signal.SIGINT)
        signals.sync()
        assert signals.leaving
        # longer than _SAME_PRESS, within which a second signal is the same key press
        time.sleep(0.6)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


@pytest.mark.parametrize(
    ("ignored", "leaving"), [("HUP", 0), ("INT", 0), ("TERM", 3), ("", 4)], ids=["nohup", "&", "batch script", "none"]
)
def test_what_nohup_and_background_jobs_ignore_stays_ignored(ignored, leaving):
    program = "import os, signal\nfrom dsrecipes.launch.signals import StopSignals\nwith StopSignals(None) as o:\n os.kill(os.getpid(), signal.SIG{}); o.sync(); print(o.leaving)"
    # exec keeps what the shell ignores, as nohup and a background job pass it on
    shell = f"trap '' {ignored}; exec \"$@\"" if ignored else 'exec "$@"'
    command = ["bash", "-c", shell, "bash", sys.executable, "-c", program.format(ignored or "HUP")]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.stdout == f"{leaving}\n", done.stderr


@pytest.mark.ranks
def test_an_ignored_sigchld_does_not_hide_how_a_rank_ended(tmp_path):
    """A shell's `trap '' CHLD` is inherited: waiting for a child would find none, and take it for a success."""
    command = [sys.executable, "-m", "dsrecipes.cli", "train", "gpt2_clm", "--procs", "2", "--dataset", "gone.txt"]
    done = subprocess.run(
        ["bash", "-c", 'trap "" CHLD; exec "$@"', "bash", *command], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2 and "error: --dataset gone.txt" in done.stderr and "Traceback" not in done.stderr, (
        done.stderr
    )


def test_the_time_limit_counts_from_the_first_start_and_leaves_time_for_two_steps(monkeypatch):
    monkeypatch.setenv(START_TIME, str(time.time() - 50))
    signals = StopSignals(60)
    signals.sync()
    assert not signals.leaving
    signals._longest_step = 6.0
    signals.sync()
    assert signals.leaving and signals.reason == "the time limit"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("3h50m", 13800),
        ("90m", 5400),
        ("45s", 45),
        ("45", 45),
        ("3h50", 10850),
        ("1d2h", 93600),
        ("3:50:00", 13800),
        (" 2h ", 7200),
    ],
)
def test_durations(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "h", "x", "-5m", "1:2:3", "50m3h", "1e9"])
def test_what_is_no_duration(text):
    with pytest.raises(UserError, match="DSR053"):
        seconds_of(text)
