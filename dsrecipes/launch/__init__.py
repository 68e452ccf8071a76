"""Processes: ranks, signals, heartbeats and the watchdog."""
