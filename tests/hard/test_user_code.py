"""Networks whose own code fails, in their factory or in a forward pass: one line that names the line of it."""

import pytest
from hard.cases import SMALL

FACTORIES = {
    "error": "raise RuntimeError('no luck\\n here')",
    "empty": "raise ValueError",
    "keys": "return {}['weights']",
    "zero": "return 1 / 0",
    "exit": "sys.exit(0)",
    "exit_text": "sys.exit('usage: train.py')",
    "interrupt": "raise KeyboardInterrupt",
    "close": "raise GeneratorExit",
    "base": "raise OfBase('odd')",
    "stop": "raise StopIteration",
    "unsaid": "raise Mute",
    "recurse": "return globals()['recurse']()",
    "file": "open('/no/such/file')",
    "end": "raise EOFError",
    "abort": "import click; raise click.Abort",
    "cycle": "m = cnn(); m.conv1.up = m; return m",
    "names": "m = cnn(); m._modules['a.b'] = nn.ReLU(); return m",
    "train": "m = cnn(); m.train = lambda mode: 1 / 0; return m",
    "none": "return None",
    "integer": "return 3",
    "several": "return [cnn(), cnn()]",
    "state": "return cnn().state_dict()",
    "kind": "return nn.ReLU",
    "sized": "m = cnn(); m.image_size = 'big'; return m",
    "mean": "m = cnn(); m.image_mean = ['a']; return m",
    "crop": "m = cnn(); m.image_std = 0; return m",
    "layers": "m = cnn(); m.named_layers = 5; return m",
    "layer": "m = cnn(); m.named_layers = {'a': 'nowhere'}; return m",
    "meta": "return cnn().to('meta')",
    "integers": "m = cnn(); m.fc = nn.Embedding(3, 3); return m.to(torch.complex64)",
    "list": "return nn.ModuleList([cnn()])",
}
FORWARDS = {
    "error": "raise RuntimeError('no luck\\n here')",
    "keys": "return {}['weights']",
    "attribute": "return self.nowhere(x)",
    "exit": "sys.exit(0)",
    "interrupt": "raise KeyboardInterrupt",
    "close": "raise GeneratorExit",
    "base": "raise OfBase('odd')",
    "stop": "raise StopIteration",
    "unsaid": "raise Mute",
    "recurse": "return self(x)",
    "file": "open('/no/such/file')",
    "not": "raise NotImplementedError",
    "single": "assert len(x) == 1, 'one at a time'; return super().forward(x)",
    "shape": "return super().forward(x[:, :, :5])",
    "two": "return self.fc(y)",
    "late": "self.seen += 1; (1 / 0 if self.seen > 1 else 0); return super().forward(x)",
    "late_exit": "self.seen += 1\n        if self.seen > 1: sys.exit(0)\n        return super().forward(x)",
}
OUTPUTS = {  # that a layer needs no more than, and a training does
    "nothing": "super().forward(x)",
    "integer": "super().forward(x); return 3",
    "several": "return [super().forward(x)] * 2",
    "short": "return super().forward(x)[:, :1]",
    "row": "return super().forward(x)[0]",
    "maps": "return super().forward(x)[:, :, None, None]",
    "whole": "return super().forward(x).long()",
    "scalar": "return super().forward(x).sum()",
}
REPLACED = {  # by a module that computes something else, from some pass on
    "later": "self.seen += 1\n        if self.seen > 3: self.relu = nn.Tanh()\n        return super().forward(x)",
    "by_turns": "self.seen += 1; self.pool = (nn.MaxPool2d, nn.AvgPool2d)[self.seen % 2](2); return super().forward(x)",
    "drop": "self.dropout = nn.Dropout(0.9); return super().forward(x)",
    "anew": "self.fc = nn.Linear(32, 10); return super().forward(x)",
    "more": "self.add_module(f'm{self.seen}', nn.Linear(2, 2)); self.seen += 1; return super().forward(x)",
    "fewer": "self._modules.pop('dropout', 0); self.dropout = abs; return super().forward(x)",
}
SAME = {"renewed": "self.relu = nn.ReLU(inplace=True); self.end = nn.ReLU(); return self.end(super().forward(x))"}
MOVING = {
    "once": "self.seen += 1\n        if self.seen == 3: os.chdir('/')\n        return super().forward(x)",
    "always": "os.chdir('/'); return super().forward(x)",
}
FINE = {
    "half": "return cnn().half()",
    "bfloat": "return cnn().bfloat16()",
    "double": "return cnn().double()",
    "prints": "print('garbage', '\\x1b[31m' * 50); sys.argv[:] = ['x']; return cnn()",
    "moves": "os.chdir('/'); torch.set_default_dtype(torch.float64); return cnn().float()",
    "mutes": "torch.set_grad_enabled(False); sys.stdout = sys.stderr = None; return cnn()",
}
HEAD = """
import os, sys, torch
from torch import nn
from tiny_networks import Tiny, cnn

class OfBase(BaseException):
    pass

class Mute(Exception):
    def __str__(self):
        raise RuntimeError('nothing to say')

"""
ANALYZE = ("analyze", "{}", *SMALL, "--out", "out")
COMMANDS = {
    "analyze": ANALYZE,
    "layers": ("layers", "{}"),
    "finetune": ("finetune", "{}", "--data", "digits", "--samples", "60", "--epochs", "1", "--device", "cpu",
                 "--out", "out"),
    "deconv": ("deconv", "{}", "--data", "digits", "--device", "cpu", "--layers", "pool@1", "--out", "out"),
    "profile": ("profile", "{}", "--device", "cpu", "--batch-sizes", "2", "--out", "out"),
}  # fmt: skip


def written(folder):
    """bad.py, with all of these networks."""
    made = [f"def {name}():\n    {body}\n" for name, body in {**FACTORIES, **FINE}.items()]
    for name, body in {**FORWARDS, **OUTPUTS, **REPLACED, **SAME, **MOVING}.items():
        given = "self, x, y" if name == "two" else "self, x"
        made.append(f"class {name.title()}(Tiny):\n    seen = 0\n    def forward({given}):\n        {body}\n")
    made.append("def needy(width, *, depth):\n    return cnn()\n")
    (folder / "bad.py").write_text(HEAD + "\n".join(made))


def run(warm, folder, command, name, *more):
    written(folder)
    return warm.run(*(part.format(f"bad:{name}") for part in COMMANDS[command]), *more, cwd=folder)


def line_of(folder, name):
    lines = (folder / "bad.py").read_text().splitlines()
    return next(i for i, line in enumerate(lines, 1) if line.startswith((f"def {name}(", f"class {name}(")))


@pytest.mark.parametrize("command", ["analyze", "layers"])
@pytest.mark.parametrize("name", [*FACTORIES, "needy", "needy(width=1)", "absent", "HEAD", "sys"])
def test_a_factory(warm, tmp_path, command, name):
    done = run(warm, tmp_path, command, name)
    assert done.code == 2, done.err
    assert done.err.splitlines()[-1].startswith("qdv-gpu: "), done.err
    assert done.refused or name == "integers"  # of which torch warns
    raising = list(FACTORIES)[: list(FACTORIES).index("abort") + 1]
    if name in [*raising, "needy", "none", "integer"]:
        line = line_of(tmp_path, name.partition("(")[0])
        assert f"bad.py:{line}" in done.err or f"bad.py:{line + 1}" in done.err, done.err


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", FORWARDS)
def test_a_forward_pass(warm, tmp_path, command, name):
    done = run(warm, tmp_path, command, name.title())
    if name == "single" and command in ("layers", "deconv"):
        assert done.code == 0, done.err
        return
    if name.startswith("late") and done.code == 0:
        assert command == "layers"
        return
    assert done.code == 2, done.err
    assert done.err.splitlines()[-1].startswith("qdv-gpu: "), done.err
    assert "Traceback" not in done.err
    if name not in ("shape", "two"):  # which fail in torch, or are not entered
        assert "bad.py:" in done.err
    assert not (tmp_path / "out" / "layers.csv").exists()


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output(warm, tmp_path, command, name):
    done = run(warm, tmp_path, command, name.title())
    assert done.refused if command == "finetune" else done.code == 0, done.err


@pytest.mark.parametrize("command", ["analyze", "finetune"])
@pytest.mark.parametrize("name", REPLACED)
def test_a_submodule_that_is_replaced(warm, tmp_path, command, name):
    """What it computes depends on how often it was run: it is kept under no key."""
    done = run(warm, tmp_path, command, name.title())
    assert done.code == 2, done.err
    assert " puts another module in the place of its submodule " in done.err.splitlines()[-1], done.err
    assert not list((tmp_path / ".qdv-store").glob("[cmpsw]*/*"))


def test_a_submodule_that_is_made_anew(warm, tmp_path):
    """The numbers are right; that layer itself is not seen."""
    done = run(warm, tmp_path, "analyze", "Renewed")
    assert done.code == 0, done.err
    done = run(warm, tmp_path, "analyze", "Renewed", "--layers", "relu")
    assert done.code == 2, done.err
    assert done.err.splitlines()[-1].endswith("is made anew in each forward pass: make it in __init__"), done.err


def test_a_training_of_a_network_that_makes_a_submodule_anew(warm, tmp_path):
    done = run(warm, tmp_path, "finetune", "Renewed")
    assert done.code == 0, done.err


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", MOVING)
def test_a_forward_pass_that_leaves_the_folder(warm, tmp_path, command, name):
    """A relative --out, its store, and the next factory are where they were."""
    done = run(warm, tmp_path, command, name.title(), *(["bad:Renewed"] if command in ("analyze", "deconv") else []))
    assert done.code == 0, done.err
    kept = {"layers": [], "analyze": ["out", ".qdv-store"], "finetune": ["out", ".qdv-store"]}.get(command, ["out"])
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == {"bad.py", *kept}


def test_items_that_leave_the_folder(warm, tmp_path):
    code = "import qdv_gpu, bad, os\nqdv_gpu.analyze(bad.Once(), bad.Items(), 'out', layers='pool', perplexity=5, "
    code += "iterations=20, seeds=1, pca=5, device='cpu')"
    written(tmp_path)
    with (tmp_path / "bad.py").open("a") as file:
        file.write("class Items:\n    def __len__(self): return 60\n    def __getitem__(self, i):\n")
        file.write("        os.chdir('/')\n        return torch.full((1, 8, 8), i, dtype=torch.uint8), i % 2\n")
    done = warm.run(code=code, before="import sys; sys.path.insert(0, '')", cwd=tmp_path)
    assert done.code == 0, done.err
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == {"bad.py", "out", ".qdv-store"}


@pytest.mark.parametrize("command", ["analyze", "finetune", "deconv"])
@pytest.mark.parametrize("name", FINE)
def test_an_odd_network(warm, tmp_path, command, name):
    done = run(warm, tmp_path, command, name)
    assert done.code == (2 if (command, name) == ("finetune", "half") else 0), done.err  # whose loss overflows
    assert (tmp_path / "out").is_dir()


@pytest.mark.parametrize("text", ["import nothing_there", "1 +", "sys.exit(0)", "raise KeyboardInterrupt", "1 / 0",
                                  "\0", "def f(", "raise AttributeError('x')", "from bad import more"])  # fmt: skip
def test_a_module_that_cannot_be_imported(warm, tmp_path, text):
    (tmp_path / "bad.py").write_text(f"import sys\n{text}\n")
    done = warm.run("layers", "bad:net", cwd=tmp_path)
    assert done.refused, done.err
    assert ("bad" if "\0" in text else "bad.py") in done.err, done.err


def test_a_traceback_on_request(warm, tmp_path):
    done = run(warm, tmp_path, "layers", "error", "--traceback")
    assert done.code == 2
    assert "Traceback" in done.err
    assert "no luck" in done.err
    assert done.err.splitlines()[-1].startswith("qdv-gpu: network bad:error cannot be built: RuntimeError: no luck")
    assert "Traceback" not in run(warm, tmp_path, "layers", "error").err


def test_code_of_an_analysis_in_python(warm, tmp_path):
    """SystemExit in a forward pass is an InputError; Ctrl-C stays what it is."""
    written(tmp_path)
    code = "import qdv_gpu, bad, torch\ntry:\n    qdv_gpu.activations(bad.{}(), torch.rand(4, 1, 8, 8))\n"
    code += "except {}:\n    pass"
    for name, kind in (("Exit", "qdv_gpu.errors.InputError"), ("Interrupt", "KeyboardInterrupt")):
        done = warm.run(code=code.format(name, kind), before="import sys; sys.path.insert(0, '')", cwd=tmp_path)
        assert done.code == 0, done.err


def test_a_sweep_goes_on(warm, tmp_path):
    written(tmp_path)
    (tmp_path / "S.toml").write_text(
        "[run]\ndata = 'digits'\nweights = 'none'\nanalyze.samples = 60\nfinetune.samples = 60\nepochs = 1\n"
        "perplexity = 5\niterations = 20\nseeds = 1\n[grid]\nnetwork = ['bad:LATE_EXIT', 'tiny_networks:cnn']\n"
        .replace("LATE_EXIT", "Late_Exit")
    )  # fmt: skip
    done = warm.run("sweep", "S.toml", "--out", "out", "--workers", "1", cwd=tmp_path)
    assert done.code != 0
    assert "bad.py:" in done.err
    assert list((tmp_path / "out").rglob("result.json"))
