from __future__ import annotations

import os

import numpy as np
import pytest

from mllm_jax.checkpoints import masks, torch_file


def random_mask(shape=(5, 4, 30)):
    mask = np.random.default_rng(0).random(shape) < 0.1
    mask[2] = False
    mask[-1] = False
    return mask


def test_pth_goes_to_torch_and_back(tmp_path):
    torch = pytest.importorskip("torch")
    mask, path = random_mask(), tmp_path / "llava-lang"
    masks.write_pth(path, mask)
    theirs = torch.load(path, weights_only=True)
    assert [len(layers) for layers in theirs] == [4] * 5
    for domain, layers in enumerate(theirs):
        for layer, neurons in enumerate(layers):
            assert neurons.dtype == torch.int64
            assert neurons.tolist() == np.flatnonzero(mask[domain, layer]).tolist()
    np.testing.assert_array_equal(masks.read_pth(path, 30), mask)


def test_pth_of_torch_without_its_empty_end(tmp_path):
    torch = pytest.importorskip("torch")
    lists = [
        [torch.tensor([3, 7]), torch.tensor([]).long()],
        [torch.tensor([0]), torch.tensor([9])],
    ]
    torch.save(lists, tmp_path / "m.pth")
    mask = masks.read_pth(tmp_path / "m.pth", 10, domains=5)
    assert mask.shape == (5, 2, 10)
    assert np.argwhere(mask).tolist() == [[0, 0, 3], [0, 0, 7], [1, 0, 0], [1, 1, 9]]
    assert len(masks.read_pth(tmp_path / "m.pth", 10)) == 2


@pytest.mark.parametrize(
    "value, message",
    [
        ({"a": np.arange(3)}, "not a list over domains"),
        ([], "not a list over domains"),
        ([[np.arange(3)], [np.arange(3), np.arange(2)]], "over equally many layers"),
        ([[np.arange(3) / 2]], "domain 0, layer 0: not a list of neuron indices"),
        ([["a"]], "domain 0, layer 0: not a list of neuron indices"),
        (
            [[np.array([1])], [np.array([2, 10])]],
            "domain 1, layer 0: neuron 10 of a layer of width 10",
        ),
        ([[np.array([-1, 4])]], "neuron -1 of a layer"),
        ([[np.array([1])]] * 3, "has 3 domains, more than the 2 expected"),
    ],
)
def test_other_files_are_refused(tmp_path, value, message):
    torch_file.write(value, tmp_path / "m.pth")
    with pytest.raises(ValueError, match=f"m.pth: .*{message}"):
        masks.read_pth(tmp_path / "m.pth", 10, domains=2)


def test_native_file(tmp_path):
    mask, path = random_mask(), tmp_path / "neurons.npz"
    domains = ("ad", "med", "rs", "com", "doc")
    masks.save(path, {"lm.mlp.act": mask, "projector.act": mask[:, :1]}, domains)
    found = masks.load(path)
    assert found.domains == domains and list(found.modules) == ["lm.mlp.act", "projector.act"]
    np.testing.assert_array_equal(found.modules["lm.mlp.act"], mask)
    np.testing.assert_array_equal(found.modules["projector.act"], mask[:, :1])


def test_native_errors(tmp_path):
    path = tmp_path / "neurons.npz"
    with pytest.raises(ValueError, match="lm.mlp.act has 5 domains, but 1 are named"):
        masks.save(path, {"lm.mlp.act": random_mask()}, ["ad"])
    with pytest.raises(ValueError, match="must be bool.domains, layers, neurons., not float64"):
        masks.save(path, {"lm.mlp.act": np.zeros((1, 2, 3))}, ["ad"])
    with pytest.raises(ValueError, match="mask must be bool"):
        masks.write_pth(path, np.zeros((2, 3), bool))
    assert not path.exists()
    with pytest.raises(FileNotFoundError):
        masks.load(path)
    np.savez(path, domains=np.array([{"a": 1}], object))
    with pytest.raises(ValueError, match=r"neurons.npz: not a file of domain neurons \(.*pickle"):
        masks.load(path)
    path.write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="not a file of domain neurons"):
        masks.load(path)


@pytest.mark.skipif(
    "MLLM_JAX_LAPE_MASK" not in os.environ,
    reason="set MLLM_JAX_LAPE_MASK to LAPE's LLaMA-2-7B.neuron.pth",
)
def test_the_published_neurons_of_llama_2_7b():
    mask = masks.read_pth(os.environ["MLLM_JAX_LAPE_MASK"], 11008)
    assert mask.shape == (7, 32, 11008)  # en zh fr es vi id ja
    assert mask.any(axis=0).sum() == 3523
    languages = np.bincount(mask.sum(axis=0).ravel(), minlength=8)
    assert languages[1:].tolist() == [2396, 856, 193, 58, 15, 5, 0]
    assert mask.sum(axis=(1, 2)).tolist() == [95, 583, 1022, 838, 836, 1068, 582]
    assert mask[:, 0].sum(axis=1).tolist() == [17, 108, 220, 195, 274, 221, 109]
