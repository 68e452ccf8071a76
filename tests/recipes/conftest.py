"""Recipes run in this process: what a run leaves in the environment does not reach the next test."""

import os

import pytest


@pytest.fixture(autouse=True)
def _environment():
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ |= before
