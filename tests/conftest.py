"""What all tests share."""

import logging

import pytest


@pytest.fixture
def said(caplog):
    """What the library tells a user, line by line."""
    caplog.set_level(logging.INFO, logger="qdv_gpu")
    return caplog.messages


@pytest.fixture
def lines(caplog):
    """A function that gives what the library has told so far."""
    caplog.set_level(logging.INFO, logger="qdv_gpu")
    return lambda: list(caplog.messages)
