"""Standard output that is closed, full, left by its reader, or of few signs."""

import pytest
from hard.cases import SMALL

ANALYZE = ("analyze", "tiny_networks:cnn", *SMALL, "--out", "out")
FEW = ("--samples", "20", "--epochs", "1", "--device", "cpu")
COMMANDS = {
    "analyze": ANALYZE,
    "finetune": ("finetune", "tiny_networks:cnn", "--data", "digits", *FEW, "--out", "out"),
    "compare": ("compare", "{runs}/cnn", "{runs}/other", "--out", "out"),
    "deconv": ("deconv", "tiny_networks:cnn", "--data", "digits", "--layers", "pool@1", "--out", "out"),
    "plot": ("plot", "{runs}/cnn", "--out", "out"),
    "export": ("export", "{runs}/cnn", "--to", "csv", "--out", "out"),
    "report": ("report", "{runs}/cnn", "--out", "out/page.html"),
    "sweep": ("sweep", "{runs}/SWEEP.toml", "--dry-run", "--out", "out"),
    "layers": ("layers", "tiny_networks:cnn"),
    "store": ("store", "--store", "{runs}/.qdv-store"),
    "version": ("--version",),
    "help": ("analyze", "--help"),
}  # fmt: skip
STREAMS = {
    "full": "import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 1)",
    "closed": "import os, sys; os.close(1); sys.stdout = None",
    "left": "import os; r, w = os.pipe(); os.dup2(w, 1); os.close(w); os.close(r)",
    "ascii": "import sys; [s.reconfigure(encoding='ascii', errors='strict') for s in (sys.stdout, sys.stderr)]",
    "error-full": "import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 2)",
    "error-left": "import os; r, w = os.pipe(); os.dup2(w, 2); os.close(w); os.close(r)",
}
SAID = {"full": "No space left on device", "closed": "Bad file descriptor"}


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_stream(warm, runs, tmp_path, command, stream):
    arguments = [part.replace("{runs}", str(runs)) for part in COMMANDS[command]]
    done = warm.run(*arguments, cwd=tmp_path, before=STREAMS[stream])
    assert done.code == {"full": 2, "closed": 2, "left": 141}.get(stream, 0), done.err
    assert "Traceback" not in done.err
    if stream in SAID:
        assert done.err.splitlines()[-1] == f"qdv-gpu: cannot write to standard output: {SAID[stream]}"
    if "out" in arguments:
        assert not list((tmp_path / "out").rglob(".qdv-gpu-tmp-*"))
        assert command == "sweep" or any((tmp_path / "out").iterdir())  # what was computed is kept


def test_a_closed_stream_is_no_place_for_files(warm, tmp_path):
    """With 1 and 2 free, the next files would be opened there, and get what is printed."""
    before = "import os, sys; [os.close(n) for n in (0, 1, 2)]; sys.stdin = sys.stdout = sys.stderr = None"
    done = warm.run(*ANALYZE, cwd=tmp_path, before=before)
    assert done.code == 2
    again = warm.run(*ANALYZE, cwd=tmp_path)
    assert again.code == 0
    assert "1 of 1" in again.err or "2 of 2 layers" in again.err
