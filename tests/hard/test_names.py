"""Names of networks, layers, classes and folders that mean something to files, terminals or figures."""

import os

import pytest

NAMES = ["../../up", "/etc", "..", "n" * 255, "A", "$x$", "\\frac{", "a\nb", "\udcff", "-x", "é" * 127, "[red]", "a,b",
         "x@2", ".hidden", "\x1b[31m", "\u202e", " ", "%s", "{}"]  # fmt: skip
CODE = """
import torch, qdv_gpu
from tiny_networks import cnn

class Odd(torch.nn.Module):
    image_size = 8

    def __init__(self, *, module):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 4, 3)
        self._modules[NAME if module else "relu"] = torch.nn.ReLU()
        if not module:
            self.named_layers = {NAME: "relu"}

    def forward(self, x):
        return list(self._modules.values())[1](self.conv(x))

x = torch.arange(60 * 64).reshape(60, 1, 8, 8).remainder(251).to(torch.uint8)
images = qdv_gpu.Images.from_arrays(x, [0, 1] * 30, [NAME, "b"], name=NAME)
few = dict(pca=5, perplexity=5, iterations=20, seeds=1, device="cpu")
two = {"layers": "pool", **few}
"""
CALLS = {
    "label": "qdv_gpu.analyze({NAME: cnn(), 'a': cnn()}, images, 'work/run', **two)",
    "layer": "qdv_gpu.analyze(Odd(module=False), images, 'work/run', **few)",
    "module": "qdv_gpu.analyze(Odd(module=True), images, 'work/run', layers=[NAME], **few)",
    "deconv": "qdv_gpu.picture({NAME: Odd(module=False), 'a': cnn()}, 'work/run', data=images, device='cpu')",
}


def everything(folder):
    return {os.path.join(top, name) for top, folders, files in os.walk(folder) for name in [*folders, *files]}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_name(warm, tmp_path, name, call):
    (tmp_path / "work").mkdir()
    done = warm.run(code=f"NAME = {name!r}\n{CODE}\n{CALLS[call]}", cwd=tmp_path)
    assert done.code == 0 or done.refused, done.err
    assert {path.name for path in tmp_path.iterdir()} == {"work"}
    assert {path.name for path in (tmp_path / "work").iterdir()} <= {"run", ".qdv-store"}


@pytest.mark.parametrize("name", ["-x", "a\nb", "$x$", "\udcff", "n" * 255, "..", "n" * 256, "\0"], ids=ascii)
def test_a_folder(warm, tmp_path, name):
    """--out of any name that a file system takes."""
    (tmp_path / "work").mkdir()
    out = "work/" + name
    code = (
        f"import qdv_gpu\nfrom tiny_networks import cnn\nqdv_gpu.profile(cnn(), {out!r}, batch_sizes=[1], device='cpu')"
    )
    done = warm.run(code=code, cwd=tmp_path)
    assert done.code == 0 or done.refused, done.err
    where = tmp_path if name == ".." else tmp_path / "work"
    assert everything(tmp_path) <= {str(tmp_path / "work")} | everything(where)


@pytest.mark.parametrize("name", ["n" * 256, "n/" * 2100, "\0", "\ud800"], ids=["name", "path", "null", "surrogate"])
@pytest.mark.parametrize(
    "call",
    ["load_network('alexnet', weights={})", "load_network({})", "load_images({})", "plot({})", "export({}, to='npz')"],
)
def test_a_path_to_read(warm, tmp_path, name, call):
    done = warm.run(code=f"import qdv_gpu\nqdv_gpu.{call.format(repr(name))}", cwd=tmp_path)
    assert done.refused, done.err
    assert not everything(tmp_path)
