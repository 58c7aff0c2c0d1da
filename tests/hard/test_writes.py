"""A disk that takes no more, at any of the calls that write: one line, nothing half-written, and a way on."""

import pytest
from hard.cases import FAIL, SMALL

FEW = ("--samples", "20", "--epochs", "1", "--device", "cpu")
COMMANDS = {
    "analyze": ("analyze", "tiny_networks:cnn", *SMALL, "--out", "out"),
    "finetune": ("finetune", "tiny_networks:cnn", "--data", "digits", *FEW, "--out", "out"),
    "deconv": ("deconv", "tiny_networks:cnn", "--data", "digits", "--layers", "pool@1", "--out", "out"),
    "plot": ("plot", "{runs}/cnn", "--out", "out"),
    "report": ("report", "{runs}/cnn", "--out", "out/page.html"),
    "parquet": ("export", "{runs}/cnn", "--to", "parquet", "--out", "out"),
    "tensorboard": ("export", "{runs}/cnn", "--to", "tensorboard", "--out", "out"),
    "compare": ("compare", "{runs}/cnn", "{runs}/other", "--out", "out"),
}  # fmt: skip
CALLS = [
    ("open", 1),
    ("open", 2),
    ("open", 6),
    ("replace", 1),
    ("replace", 3),
    ("fsync", 1),
    ("fsync", 4),
    ("mkdir", 1),
]
CODES = ["ENOSPC", "EDQUOT", "EIO", "EFBIG", "EROFS", "ENAMETOOLONG", "EACCES"]


@pytest.mark.parametrize(
    ("command", "call", "code"),
    [
        (command, CALLS[(i + j) % len(CALLS)], CODES[(i * 3 + j) % len(CODES)])
        for i, command in enumerate(COMMANDS)
        for j in range(5)
    ],
)
def test_a_write_fails(warm, runs, tmp_path, *, command, call, code):
    arguments = [part.replace("{runs}", str(runs)) for part in COMMANDS[command]]
    before = f"{FAIL}\nfail(*{call!r}, errno.{code}, {str(tmp_path)!r})"
    done = warm.run(*arguments, cwd=tmp_path, before=before)
    assert "Traceback" not in done.err
    assert done.code in (0, 2), done.err  # 0 where there are fewer calls
    if done.code == 2:
        assert done.err.splitlines()[-1].startswith("qdv-gpu: ")
    assert not list(tmp_path.rglob(".qdv-gpu-tmp-*"))
    again = warm.run(*arguments, cwd=tmp_path)
    assert again.code == 0, again.err


@pytest.mark.parametrize("command", ["analyze", "finetune", "parquet", "report"])
def test_files_of_a_limited_size(warm, runs, tmp_path, command):
    arguments = [part.replace("{runs}", str(runs)) for part in COMMANDS[command]]
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))"
    done = warm.run(*arguments, cwd=tmp_path, before=limit)
    assert done.code == 2, done.err
    assert done.err.splitlines()[-1].startswith("qdv-gpu: cannot write ")
    assert not list(tmp_path.rglob(".qdv-gpu-tmp-*"))
