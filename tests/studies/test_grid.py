"""SWEEP.toml: its points, and what is wrong with it, with line and key."""

import pytest
import torch
from tiny_sweep import TABLE, TOML, changed

from qdv_gpu.errors import InputError
from qdv_gpu.studies.grid import changed_keys, read_sweep


def test_points_of_a_grid():
    _, points = read_sweep(TABLE)
    assert [(p.network, p.training.lr, p.run) for p in points[:4]] == [
        ("tiny_networks:cnn", 1e-3, 1),
        ("tiny_networks:cnn", 1e-3, 2),
        ("tiny_networks:cnn", 1e-3, 3),
        ("tiny_networks:cnn", 1e-2, 1),
    ]
    assert len(points) == 12
    assert [p.training.seed for p in points[:3]] == [0, 1, 2]
    assert len({p.candidate for p in points}) == 4
    assert len({p.name for p in points}) == 12
    assert points[0].label == "tiny_networks:cnn (lr=0.001)"
    assert points[0].training.samples == 200
    assert points[0].settings.samples == 100
    assert points[0].training.threads == 1


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])  # which some editors of Windows write
def test_a_file_and_a_dict_are_the_same(tmp_path, encoding):
    file = tmp_path / "sweep.toml"
    file.write_text(TOML, encoding=encoding)
    assert [p.digest for p in read_sweep(file)[1]] == [p.digest for p in read_sweep(TABLE)[1]]


def test_single_points_and_a_grid_without_training():
    run = dict.fromkeys(("epochs", "batch_size", "finetune", "analyze", "perplexity"))
    table = changed(run=run | {"network": "tiny_networks:cnn"}, grid={"network": None, "lr": None, "runs": None})
    table["grid"] = {"perplexity": [5, 8]}
    table["points"] = [{"pca": 10, "perplexity": 7}, {"network": "tiny_networks:other"}]
    _, points = read_sweep(table)
    assert [p.label for p in points] == [
        "perplexity=5",
        "perplexity=8",
        "pca=10, perplexity=7",
        "tiny_networks:other",
    ]
    assert all(p.training is None for p in points)
    assert points[2].settings.pca == 10


def test_a_shared_setting_goes_to_both():
    _, [point, *_] = read_sweep(changed(run={"image_size": 9, "split": "train"}))
    assert (point.training.image_size, point.settings.image_size) == (9, 9)
    assert (point.training.split, point.settings.split) == ("train", "train")


def test_texts_are_read_as_on_the_command_line():
    _, [point, *_] = read_sweep(changed(run={"memory": "1GB", "k": "1,5", "mean": "0.5"}))
    assert (point.settings.memory, point.settings.k, point.training.mean) == (10**9, (1, 5), (0.5,))


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("lr = [1e-3", "lrr = [1e-3", 16, "grid.lrr: unknown setting 'lrr': did you mean lr"),
        ("perplexity = 8", "perplexty = 8", 9, "run.perplexty: unknown setting 'perplexty': did you mean perplexity"),
        ("lr = [1e-3, 1e-2]", "lr = 1e-3", 16, "grid.lr: the grid needs a list of values, got 0.001"),
        ("lr = [1e-3, 1e-2]", "lr = []", 16, "grid.lr: the list is empty: at least one value is required"),
        ("epochs = 1", 'epochs = "one"', 5, "run.epochs: epochs must be an integer of at least 1, got 'one'"),
        ("lr = [1e-3, 1e-2]", 'lr = [1e-3, "x"]', 16, "grid.lr: lr must be a number of at least 0, got 'x'"),
        ("analyze.samples = 100", "samples = 100", 8, "run.samples: say which: finetune.samples of training images"),
        ("runs = 3", "runs = 0", 17, "grid.runs: a number of runs, or a list of different ones from 1"),
        ("runs = 3", "epochs = [1]", 17, "grid.epochs: it is set in [run] too"),
        ("[grid]", "[gird]", 14, "gird: unknown table 'gird': did you mean grid?"),
        ('data = "digits"', "data = 3", 3, "run.data: a text is required, got 3"),
        ('data = "digits"', "", 2, "run.data: it is required"),
        ('"tiny_networks:cnn", ', "3, ", 15, "grid.network: the name of a network is required"),
        ("finetune.samples", "finetune.perplexity", 7, "run.finetune.perplexity: unknown setting"),
    ],
)
def test_mistakes_have_file_line_and_key(tmp_path, old, new, line, message):
    file = tmp_path / "sweep.toml"
    assert old in TOML
    file.write_text(TOML.replace(old, new, 1))
    with pytest.raises(InputError) as caught:
        read_sweep(file)
    assert str(caught.value).startswith(f"{file}:{line}: {message}"), str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mistake_in_a_single_point_has_its_own_line(tmp_path):
    file = tmp_path / "sweep.toml"
    file.write_text(TOML + '\n[[points]]\nnetwork = "alexnet"\n\n[[points]]\nnetwork = "alexnet"\nlr = "fast"\n')
    with pytest.raises(InputError, match=r"sweep.toml:24: points.lr: lr must be a number"):
        read_sweep(file)


def test_no_toml(tmp_path):
    file = tmp_path / "sweep.toml"
    file.write_text("[run\n")
    with pytest.raises(InputError, match="line 1"):
        read_sweep(file)
    file.write_text(f"[run]\nperplexity = {'9' * 5000}\n")
    with pytest.raises(InputError, match=r"sweep.toml: Exceeds the limit"):
        read_sweep(file)
    with pytest.raises(InputError, match="cannot be read"):
        read_sweep(tmp_path / "none.toml")


def test_empty_large_and_doubled():
    with pytest.raises(InputError, match="no points"):
        read_sweep({"run": TABLE["run"]})
    with pytest.raises(InputError, match="12 points: at most 4"):
        read_sweep(TABLE, max_points=4)
    with pytest.raises(InputError, match=r"1,000,000 points: at most 10,000"):
        read_sweep(changed(grid={"lr": [0.1] * 1000, "seed": list(range(1000)), "network": None}))
    with pytest.raises(InputError, match="is there twice"):
        read_sweep(changed(grid={"lr": [0.1, 0.1]}))


def test_variants_by_name_table_and_object():
    from qdv_gpu import Variant

    edits = {"features.0": {"kernel_size": 7, "stride": 2}}
    table = {"base": "alexnet", "edits": edits, "carry": "crop"}
    names = ["alexnet[features.0.kernel_size=7, features.0.stride=2, carry=crop]", table, Variant(**table)]
    found = [read_sweep(changed(grid={"network": [name], "lr": [0.1], "runs": 1}))[1][0] for name in names]
    assert len({point.digest for point in found}) == 1
    with pytest.raises(InputError, match=r"grid.network: unknown key of a variant 'edit': did you mean edits"):
        read_sweep(changed(grid={"network": [{"base": "alexnet", "edit": edits}]}))
    with pytest.raises(InputError, match="must be a name, which other processes can build"):
        read_sweep(
            changed(grid={"network": [Variant(torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1)), {"0": {"stride": 2}})]})
        )


def test_changed_keys():
    found = changed_keys(TABLE, changed(grid={"lr": [1.0]}, run={"seeds": None}))
    assert found == ["run.seeds (2 → None)", "grid.lr ([0.001, 0.01] → [1.0])"]


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"grid": {"lr": [1, 1.0]}}, "lr=1.0), run 1, is there twice, once as"),
        ({"grid": {"network": ["alexnet[width=2]", "alexnet[ width = 2.0 ]"], "lr": None}}, "is there twice, once as"),
        ({"grid": {"network": ["a=alexnet", "b=alexnet"], "lr": None}}, "b=alexnet, run 1, is there twice, once as a="),
        ({"run": {"finetune": {"lr": 0.1, "samples": 200}}}, "grid.lr: it is set in [run] too, as finetune.lr: one of"),
        ({"run": {"finetune": {"epochs": 2, "samples": 200}}}, "run.epochs: it is set as finetune.epochs too: one of"),
        ({"grid": {"finetune": {"seed": [0, 1]}, "lr": None}}, "seed=1) differ in their seeds alone, as runs of one"),
        ({"grid": {"runs": 10**12}}, "the sweep has 4,000,000,000,000 points: at most 10,000 are"),
        ({"run": {"finetune": {"k": [3]}}}, "run.finetune.k: unknown setting of finetune 'k': "),
    ],
)
def test_what_is_said_twice_or_too_often(tables, message):
    with pytest.raises(InputError) as error:
        read_sweep(changed(**tables))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("keys", [("image_size", "analyze"), ("analyze", "image_size")])
def test_what_says_which_study_counts_in_any_order(keys):
    more = {"image_size": 16, "analyze": {"image_size": 24, "samples": 100}}
    table = changed(run={"analyze": None}) | {}
    table["run"] |= {key: more[key] for key in keys}
    point = read_sweep(table)[1][0]
    assert (point.training.image_size, point.settings.image_size) == (16, 24)
