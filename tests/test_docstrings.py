"""Every example in a docstring gives what it says."""

import doctest
import importlib
import pkgutil

import numpy as np
import pytest
import torch

import qdv_gpu

MODULES = [
    module.name
    for module in pkgutil.walk_packages(qdv_gpu.__path__, "qdv_gpu.")
    if not module.name.endswith(("__main__", "kernels.cpu"))
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    names = {**vars(module), "np": np, "torch": torch, "nn": torch.nn, "tmp_path": tmp_path}
    results = doctest.testmod(
        module, extraglobs=names, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.IGNORE_EXCEPTION_DETAIL
    )
    assert results.failed == 0
