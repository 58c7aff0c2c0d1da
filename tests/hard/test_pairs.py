"""Two commands at once on one run folder or one store: the bytes of each alone, or one line."""

import json

import pytest
from hard.cases import SMALL
from tiny_analysis import outcome

A = ("analyze", "tiny_networks:cnn", *SMALL, "--out", "out")
SWEEP = ("sweep", "s.toml", "--out", "swept")
PAIRS = {
    "the same": (A, A),
    "another perplexity": (A, (*A, "--perplexity", "6")),
    "another folder": (A, (*A, "--out", "other")),
    "another folder and perplexity": (A, (*A, "--out", "other", "--perplexity", "6")),
    "a report": (A, ("report", "out")),
    "figures": (A, ("plot", "out")),
    "files": (A, ("export", "out", "--to", "csv")),
    "a comparison": (A, ("compare", "tiny_networks:cnn", "tiny_networks:other", *SMALL, "--out", "other")),
    "pictures": (A, ("deconv", "tiny_networks:cnn", "--data", "digits", "--layers", "pool@1", "--device", "cpu",
                     "--out", "out")),
    "a training": (A, ("finetune", "tiny_networks:cnn", "--data", "digits", "--samples", "60", "--epochs", "1",
                       "--device", "cpu", "--out", "out")),
    "a clean-up": (A, ("store", "--remove-unused")),
    "two sweeps": (SWEEP, SWEEP),
    "a sweep and its state": (SWEEP, ("status", "swept")),
    "a sweep and its report": (SWEEP, ("report", "swept")),
    "a sweep and an analysis": (SWEEP, A),
}  # fmt: skip
BOTH = """
import json, os, signal, sys, time
from hard.cases import of_command
started = []
for number, argv in enumerate({pair!r}):
    process = os.fork()
    if not process:
        os.dup2(os.open(f"err{{number}}", os.O_WRONLY | os.O_CREAT), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.argv = ["qdv-gpu", *argv]
        code = 70
        try:
            code = of_command() or 0
        except BaseException as error:
            os.write(2, f"Traceback {{error!r}}".encode())
        finally:
            sys.stderr.flush()
            os._exit(code)
    started.append(process)
    time.sleep({delay})
if {kill}:
    os.kill(started[0], signal.SIGKILL)
print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(one, 0)[1]) for one in started]))
"""


def both(warm, folder, pair, *, delay, kill=False):
    """The exit codes of two commands that run at once, and what they said."""
    run = "data = 'digits'\nweights = 'none'\nanalyze.samples = 60\nperplexity = 5\niterations = 20\nseeds = 1\n"
    run += "pca = 5\ndevice = 'cpu'\nlayers = 'pool'\n"
    (folder / "s.toml").write_text(f"[run]\n{run}[grid]\nnetwork = ['tiny_networks:cnn', 'tiny_networks:other']\n")
    done = warm.run(code=BOTH.format(pair=pair, delay=delay, kill=kill), cwd=folder)
    assert done.code == 0, done.err  # also if it hangs
    return json.loads(done.out), [(folder / f"err{number}").read_text() for number in range(2)]


def numbers(folder):
    """Of an analysis, whatever pictures are beside them."""
    rows, arrays, predictions = outcome(folder)
    return rows, {name: held for name, held in arrays.items() if name.startswith("embeddings")}, predictions


@pytest.fixture(scope="module")
def alone(warm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    assert warm.run(*A, cwd=folder).code == 0
    return numbers(folder / "out")


@pytest.mark.parametrize("delay", [0, 0.3, 1])
@pytest.mark.parametrize("name", PAIRS)
def test_two_commands_at_once(warm, tmp_path, alone, name, delay):
    codes, said = both(warm, tmp_path, PAIRS[name], delay=delay)
    for code, text in zip(codes, said, strict=True):
        assert "Traceback" not in text
        assert code in (0, 2), text
        assert code == 0 or text.splitlines()[-1].startswith("qdv-gpu: "), text
    assert 0 in codes, said
    done = warm.run(*A, cwd=tmp_path)
    if name in ("a training", "pictures") and codes == [2, 0]:  # the second was first, and the folder is its own
        assert done.refused
    else:
        assert done.code == 0, done.err
        assert numbers(tmp_path / "out") == alone


@pytest.mark.parametrize("delay", [0.1, 0.5, 0.8, 1.2])
@pytest.mark.parametrize("name", ["the same", "another folder", "two sweeps", "a sweep and an analysis", "a clean-up"])
def test_one_of_two_commands_is_killed(warm, tmp_path, alone, name, delay):
    (_, code), (_, text) = both(warm, tmp_path, PAIRS[name], delay=delay, kill=True)
    assert code in (0, 2), text
    assert "Traceback" not in text
    done = warm.run(*A, cwd=tmp_path)
    assert done.code == 0, done.err
    assert "damaged" not in done.err
    assert numbers(tmp_path / "out") == alone
