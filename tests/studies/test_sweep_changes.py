"""Sweeps that go on after what they are of has changed: stages, checkpoints, images."""

import pytest
import torch
from tiny_sweep import changed, drawn, kinds, plain, rows

from qdv_gpu.networks.load import load_network
from qdv_gpu.studies import point
from qdv_gpu.studies.status import status
from qdv_gpu.studies.sweep import sweep


def test_a_stage_that_is_gone_is_computed_again(tmp_path, trained):
    table = changed(grid={"lr": [1e-2], "network": ["tiny_networks:cnn"], "runs": 1})
    sweep(table, tmp_path / "one")
    before = rows(tmp_path / "one")
    [stage] = (tmp_path / ".qdv-store" / "scores").glob("*pool_1*")
    (stage / "arrays.npz").write_bytes(b"")
    assert kinds(tmp_path / "one") == ["waiting"]
    assert "stages of it have gone from the store" in status(tmp_path / "one").table()[1][-1]
    sweep(table, tmp_path / "one")
    assert rows(tmp_path / "one") == before
    assert len(trained) == 1


def test_points_of_another_version_say_so(tmp_path, monkeypatch):
    """As where workers run another environment: they are done, and count for nothing here."""
    sweep(plain(), tmp_path / "one")
    monkeypatch.setattr(point, "VERSIONS", {**point.VERSIONS, "map": 0})
    rows = status(tmp_path / "one").table()[1:]
    assert {row[1] for row in rows} == {"waiting"}
    assert all("what computed it was another version of qdv_gpu (" in row[-1] for row in rows)


def test_a_checkpoint_that_has_changed_is_noticed(tmp_path, lines):
    """Under the same name, between two calls."""
    table, found = plain(), []
    table["grid"]["network"] = [f"tiny_networks:cnn={tmp_path / 'best.pt'}"]
    for seed in (0, 1):
        network = load_network("tiny_networks:cnn", weights="none", seed=seed, device="cpu")
        torch.manual_seed(seed)
        state = {name: torch.randn_like(tensor) for name, tensor in network.module.state_dict().items()}
        torch.save(state, tmp_path / "best.pt")
        found.append(sweep(table, tmp_path / "one").ranking.top.maps.nh.tolist())
    assert found[1] == sweep(table, tmp_path / "two", store=tmp_path / "fresh").ranking.top.maps.nh.tolist() != found[0]
    said = "was of other weights, and is computed again"
    assert sum(said in line for line in lines()) == 1
    assert sweep(table, tmp_path / "one").ranking.top.maps.nh.tolist() == found[1]
    assert sum(said in line for line in lines()) == 1


@pytest.mark.parametrize("trains", [False, True])
def test_images_that_have_changed_are_noticed(tmp_path, lines, trains):
    """Under the same names, between two calls: the second ranks by those that are there."""
    own = {"data": str(tmp_path / "images"), "analyze": {"samples": "all"}, "image_size": 8, "perplexity": 5}
    table = plain(**own)
    if trains:
        table = changed(run={**own, "finetune": {"samples": "all"}}, grid={"lr": [1e-2], "runs": 1})
    found = []
    for seed in (0, 1):
        for number, name in enumerate(("train/a", "train/b", "test/a", "test/b")):
            drawn(tmp_path / "images" / name, 10 * seed + number)
        found.append(sweep(table, tmp_path / "one").ranking.top.maps.nh.tolist())
    fresh = sweep(table, tmp_path / "two", store=tmp_path / "fresh").ranking.top.maps.nh.tolist()
    assert found[1] == fresh != found[0]
    assert sum("was of other images, and is computed again" in line for line in lines()) == 2
    assert sweep(table, tmp_path / "one").ranking.top.maps.nh.tolist() == fresh
    assert sum("was of other images, and is computed again" in line for line in lines()) == 2
