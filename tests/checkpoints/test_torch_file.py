from __future__ import annotations

import collections
import io
import os
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest

from mllm_jax.checkpoints import torch_file

MASKS = [[np.array([3, 1, 4]), np.zeros(0, np.int64)], [np.array([1]), np.array([5, 9])]]


def write_pickle(path, program: bytes, *entries: tuple[str, bytes], compress=zipfile.ZIP_STORED):
    """A file of `torch.save` around any pickle."""
    with zipfile.ZipFile(path, "w", compress) as archive:
        archive.writestr("any/data.pkl", program)
        for name, content in entries:
            archive.writestr(f"any/{name}", content)
    return path


def assert_same(a, b):
    if isinstance(a, (list, tuple, dict)):
        assert type(a) is type(b) and len(a) == len(b)
        pairs = zip(a.items(), b.items()) if isinstance(a, dict) else zip(a, b)
        for x, y in pairs:
            assert_same(x, y)
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_array_equal(a, b)
    else:
        assert a == b


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def test_lists_of_tensors_go_to_torch_and_come_back(torch, tmp_path):
    value = {
        "masks": MASKS,
        "tensors": [
            np.arange(6).reshape(2, 3).astype(dtype)
            for dtype in (np.float64, np.float16, np.int32, np.int16, np.uint8, np.int8, np.bool_)
        ],
        "rest": (1, -2.5, "word", None, True, np.float32(3)),
    }
    path = tmp_path / "masks.pth"
    torch_file.write(value, path)
    theirs = torch.load(path, weights_only=True)
    assert theirs["masks"][1][1].dtype == torch.int64
    np.testing.assert_array_equal(theirs["masks"][1][1].numpy(), [5, 9])
    assert theirs["rest"] == (1, -2.5, "word", None, True, torch.tensor(3.0))
    for ours, array in zip(theirs["tensors"], value["tensors"], strict=True):
        assert_same(ours.numpy(), array)
    value["rest"] = (*value["rest"][:-1], np.asarray(value["rest"][-1]))
    assert_same(torch_file.read(path), value)
    before = path.read_bytes()
    torch_file.write(torch_file.read(path), path)
    assert path.read_bytes() == before


def test_bfloat16(torch, tmp_path):
    array = np.array([[1.0, -2.5], [3e38, 1e-30]], ml_dtypes.bfloat16)
    torch_file.write([array], tmp_path / "b.pth")
    (theirs,) = torch.load(tmp_path / "b.pth", weights_only=True)
    assert theirs.dtype == torch.bfloat16
    np.testing.assert_array_equal(theirs.float().numpy(), array.astype(np.float32))
    torch.save([theirs], tmp_path / "t.pth")
    assert_same(torch_file.read(tmp_path / "t.pth"), [array])


def test_what_torch_saves(torch, tmp_path):
    layer = torch.nn.Linear(3, 4)
    weight = layer.weight.detach()
    state = layer.state_dict()  # an ordered dict with a field _metadata
    state |= {
        "parameter": layer.bias,
        "turned": weight.T,
        "part": weight[1:, ::2],
        "same": weight,
        "spread": torch.arange(3).expand(2, 3),
        "number": torch.tensor(7),
        "empty": torch.zeros(0, 5),
    }
    value = {"state": state, "also": [torch.float16, torch.Size([1, 2]), torch.device("cpu")]}
    torch.save(value, tmp_path / "s.pth")
    ours = torch_file.read(tmp_path / "s.pth")
    assert ours["also"] == ["float16", (1, 2), "cpu"]
    assert list(ours["state"]) == list(state)
    for key, tensor in state.items():
        assert_same(ours["state"][key], tensor.detach().numpy())


def test_tensors_are_mapped_and_not_writable(tmp_path):
    torch_file.write([np.ones(4, np.float32)], tmp_path / "m.pth")
    (array,) = torch_file.read(tmp_path / "m.pth")
    base = array
    while base.base is not None and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 2


class Call:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class Build(Call):
    def __reduce__(self):
        return (*self.call, {"path": "/etc/passwd"})


def spawn(path):
    return Call(os.mkdir, str(path))


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
@pytest.mark.parametrize(
    "hide",
    [
        lambda call: call,
        lambda call: {"weight": [collections.OrderedDict(a=call)]},
        lambda call: {call: 1},
        lambda call: Call(collections.OrderedDict, [("a", call)]),
    ],
    ids=["bare", "nested", "key", "argument"],
)
def test_a_hostile_pickle_does_not_run(tmp_path, protocol, hide):
    trap = tmp_path / "trap"
    program = pickle.dumps(hide(spawn(trap)), protocol)
    path = write_pickle(tmp_path / "bad.bin", program)
    with pytest.raises(ValueError) as error:
        torch_file.read(path)
    assert not trap.exists()
    name = f"{os.mkdir.__module__}.mkdir"
    assert f"bad.bin: refused, it calls {name} and only tensors are read" in str(error.value)
    assert "\n" not in str(error.value)
    pickle.loads(program)  # the trap works
    assert trap.exists()


@pytest.mark.parametrize(
    "ask",
    ["builtins\neval", "builtins\ngetattr", "torch\nload", "torch.storage\n_load_from_bytes",
     "numpy\ndtype", "collections\nabc.sys.modules", "torch._utils\n_rebuild_tensor_v2.__globals__"],
)  # fmt: skip
def test_only_names_of_the_list_are_given(tmp_path, ask):
    path = write_pickle(tmp_path / "bad.bin", b"c" + ask.encode() + b"\n.")
    with pytest.raises(ValueError, match="refused, it calls " + ask.replace("\n", "[.]")):
        torch_file.read(path)


REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def storage(key=b"0", kind=b"Float", count=4) -> bytes:
    return b"(X\x07\0\0\0storagectorch\n%bStorage\nX\x01\0\0\0%bX\x03\0\0\0cpuK%ctQ" % (
        kind, key, count,
    )  # fmt: skip


@pytest.mark.parametrize(
    "program",
    {
        "no such storage": REBUILD + b"(" + storage(key=b"7") + b"K\0K\4\x85K\1\x85\x89NtR.",
        "storage too short": REBUILD + b"(" + storage(count=5) + b"K\0K\5\x85K\1\x85\x89NtR.",
        "beyond the storage": REBUILD + b"(" + storage() + b"K\1K\4\x85K\1\x85\x89NtR.",
        "stride beyond": REBUILD + b"(" + storage() + b"K\0K\4\x85K\2\x85\x89NtR.",
        "negative": REBUILD + b"(" + storage() + b"K\0K\4\x85J\xff\xff\xff\xff\x85\x89NtR.",
        "strings for numbers": REBUILD + b"(" + storage() + b"K\0X\1\0\0\0a\x85K\1\x85\x89NtR.",
        "an object storage": b"(X\x07\0\0\0storageX\6\0\0\0objectX\1\0\0\0\x30X\3\0\0\0cpuK\4tQ.",
        "a plain persistent id": b"Pstorage\n.",
        "set on a function": REBUILD + b"}X\4\0\0\0pathX\1\0\0\0ssNq\0(}h\0tb.",
        "set on a tensor": storage() + b"}X\4\0\0\0pathX\1\0\0\0xsb.",
        "set on a class": b"ccollections\nOrderedDict\n}X\4\0\0\0copyX\1\0\0\0xsb.",
        "call of a string": b"ctorch\nfloat32\n)R.",
        "a large memo": b"Nr\xff\xff\xff\0.",
        "truncated": b"\x80\x02}X\x09\0\0\0wei",
        "empty": b"",
    }.items(),
    ids=lambda item: item[0],
)
def test_malformed_pickles(tmp_path, program):
    path = write_pickle(tmp_path / "bad.bin", program[1], ("data/0", b"\0" * 16))
    with pytest.raises(ValueError, match=r"bad.bin: not a pickle of tensors \(") as error:
        torch_file.read(path)
    assert "\n" not in str(error.value)
    assert not hasattr(collections.OrderedDict.copy, "strip")


def test_a_list_within_itself(tmp_path):
    endless: list = []
    endless.append(endless)
    path = write_pickle(tmp_path / "bad.bin", pickle.dumps(endless, 2))
    with pytest.raises(ValueError, match="a list contains itself"):
        torch_file.read(path)


def test_broken_and_foreign_files(torch, tmp_path):
    path = tmp_path / "w.bin"
    torch.save({"w": torch.ones(300)}, path)
    whole = path.read_bytes()
    for bad in (whole[:-10], whole[:700], whole[300:], b"", b"version https://git-lfs"):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"w.bin: truncated or altered"):
            torch_file.read(path)
    torch.save({"w": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(
        ValueError, match=r"w.bin: the format of PyTorch before 1.6; write it again"
    ):
        torch_file.read(path)
    path.write_bytes(pickle.dumps({"w": 1}))
    with pytest.raises(ValueError, match=r"w.bin: a bare pickle, which is not read"):
        torch_file.read(path)
    write_pickle(path, pickle.dumps({}), compress=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"w.bin: compressed"):
        torch_file.read(path)
    write_pickle(path, pickle.dumps({}), ("byteorder", b"big"))
    with pytest.raises(ValueError, match=r"w.bin: big-endian"):
        torch_file.read(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "")
    with pytest.raises(ValueError, match=r"w.bin: .*no data.pkl"):
        torch_file.read(path)
    with pytest.raises(FileNotFoundError):
        torch_file.read(tmp_path / "none.bin")


def test_any_damaged_byte_is_one_clear_error(tmp_path):
    torch_file.write({"w": np.ones(3)}, tmp_path / "w.bin")
    whole = bytearray((tmp_path / "w.bin").read_bytes())
    errors = 0
    for place in range(0, len(whole), 2):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        (tmp_path / "w.bin").write_bytes(damaged)
        try:
            torch_file.read(tmp_path / "w.bin")
        except ValueError as error:
            assert str(error).startswith(f"{tmp_path / 'w.bin'}: ")
            errors += 1
    assert errors > len(whole) // 8


def test_what_is_not_written(tmp_path):
    for value, message in (
        ({"a": {1, 2}}, "not set"),
        ([np.array(["a"])], "hold .*float32.*, not <U1"),
        ([np.zeros(2, np.complex64)], "not complex64"),
        ([io.BytesIO()], "not BytesIO"),
    ):
        with pytest.raises(TypeError, match=message):
            torch_file.write(value, tmp_path / "w.pth")
    assert not list(tmp_path.iterdir())
