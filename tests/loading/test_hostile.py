"""Checkpoints that somebody damaged or made to do harm: right, or refused in one short line."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import struct
import time
import zipfile

import numpy as np
import pytest
import safetensors.numpy

from mllm_jax import files
from mllm_jax.checkpoints import archive, masks, schema, torch_file
from mllm_jax.families.llava import model as llava
from mllm_jax.loading import load, save, settings
from tests.helpers import damage
from tests.helpers.damage import refused

FORMATS = (
    "safetensors", "bin", "shards", "index", "original", "config", "gguf", "onnx", "npz", "pth",
)  # fmt: skip
FOLDERS = {"index": "shards", "config": "safetensors"}  # of formats that share one


@pytest.fixture(scope="module")
def checkpoints(random_model, tmp_path_factory):
    """One checkpoint of every format, and a folder for damaged copies."""
    root = tmp_path_factory.mktemp("formats")
    config = llava.LlavaConfig.of(
        llava.ClipConfig.tiny(), llava.DecoderConfig.tiny(), image_token=95
    )
    formats = damage.write_all(random_model(config), root)
    return root, formats


@pytest.fixture
def directory(checkpoints, tmp_path):
    """A copy of the checkpoint in safetensors."""
    return shutil.copytree(checkpoints[0] / "safetensors", tmp_path / "model")


def fuzz(checkpoints, place, name, seeds):
    root, formats = checkpoints
    source = root / FOLDERS.get(name, name)
    found = [damage.attempt(formats[name], source, place, seed) for seed in seeds]
    assert False not in found, [seed for seed, right in zip(seeds, found) if right is False]
    assert found.count(None) > len(seeds) // 2


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files_are_right_or_refused(checkpoints, tmp_path, name):
    fuzz(checkpoints, tmp_path / "copy", name, range(6 if name in FORMATS[:6] else 40))


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, pytest.param(4, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", FORMATS)
def test_many_damaged_files(checkpoints, tmp_path, name, times):
    count = times * (10 if name in FORMATS[:6] else 100)
    fuzz(checkpoints, tmp_path / "copy", name, range(1000, 1000 + count))


def test_a_damaged_byte_of_an_archive_never_gives_other_numbers(tmp_path):
    """885 of 1,134 flips in the offsets of headers did."""
    path, value = tmp_path / "w.bin", {"a": np.arange(30.0), "b": -np.arange(30.0)}
    torch_file.write(value, path)
    whole, wrong = path.read_bytes(), 0
    for place in range(0, len(whole), 3):
        altered = bytearray(whole)
        altered[place] ^= 1 << place % 8
        path.write_bytes(altered)
        try:
            found = torch_file.read(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: ") and len(str(error)) < 400
            wrong += 1
        else:
            np.testing.assert_equal(found, value)
    assert wrong > 0.25 * len(whole)


def test_archives_whose_members_share_bytes(tmp_path):
    """A directory may name the same stretch a thousand times."""
    path = tmp_path / "m.npz"
    np.savez(path, domains=np.array(["a"]), x=np.zeros((1, 1, 10**5), bool))
    whole = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as opened:
        entry, start = opened.getinfo("x.npy"), opened.start_dir
    record = bytes(whole[start:]).partition(b"PK\1\2")[2].partition(b"PK\1\2")[2]
    record = b"PK\1\2" + record[: record.index(b"PK\5\6")]
    twin = record.replace(b"x.npy", b"y.npy")
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 2, 2, len(record) + len(twin), start, 0)
    path.write_bytes(bytes(whole[:start]) + record + twin + end)
    assert entry.file_size > 10**5
    with pytest.raises(archive.Damaged, match="not at the position|overlaps"):
        archive.members(path)
    refused(lambda: masks.load(path), "m.npz")


@pytest.mark.parametrize("kind", ["fifo", "device", "directory"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_pipes_and_devices_are_not_opened(directory, kind, name):
    path = directory / name
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    assert "not a regular file" in refused(lambda: load.read_model(directory), name)


@pytest.mark.parametrize("read", [
    torch_file.read, lambda path: masks.read_pth(path, 3), masks.load,
    lambda path: files.read_json(path), lambda path: damage.read_gguf.read(path),
    lambda path: damage.read_onnx.read(path),
])  # fmt: skip
def test_no_reader_opens_a_device(tmp_path, read):
    (tmp_path / "zeros").symlink_to("/dev/zero")
    assert "not a regular file" in refused(lambda: read(tmp_path / "zeros"), "zeros")


def write_pickle(path, program: bytes, storage: bytes = b"\0" * 16, **how):
    with zipfile.ZipFile(path, "w", **how) as opened:
        opened.writestr("any/data.pkl", program)
        opened.writestr("any/data/0", storage)
    return path


def shared(kind: bytes, depth: int) -> bytes:
    """A pickle of lists or tuples, each of which holds the one before twice."""
    program = b"]q\0" if kind == b"]" else b")q\0"
    for n in range(depth):
        at, put = bytes([n]), bytes([n + 1])
        if kind == b"]":
            program += b"](h" + at + b"h" + at + b"eq" + put
        else:
            program += b"h" + at + b"h" + at + b"\x86q" + put
    return program


def test_pickles_that_grow(tmp_path):
    path = tmp_path / "m.pth"
    for program in (
        shared(b"]", 60) + b".",
        shared(b")", 60) + b".",
        shared(b")", 60) + b"}h" + bytes([60]) + b"Ns.",  # as a key, which is hashed
        b"}" + shared(b")", 60) + b"Ns.",
        b"ctorch\ndevice\n" + shared(b")", 60) + b"\x85R.",
        b"]" * 10**6 + b"." ,
        b"(" * 10**4 + b"]" + b"l" * 10**4 + b".",
        b"\x8a\xff" + b"\x7f" * 255 + b".",
    ):  # fmt: skip
        write_pickle(path, program)
        message = refused(lambda: masks.read_pth(path, 10), "m.pth")
        refused(lambda: load.tensors.open_file(path), "m.pth")
    assert message


def test_lists_shared_in_a_way_that_only_their_order_hides(tmp_path):
    """Filled from the outside in, no list is heavy when it is put into another."""
    program = b"".join(b"]q" + bytes([n]) for n in range(40))
    program += b"".join(b"h" + bytes([n]) + b"(h" + bytes([n + 1]) * 1 + b"h" + bytes([n + 1]) + b"e"
                        for n in range(39))  # fmt: skip
    write_pickle(tmp_path / "m.pth", program + b"h\0.")
    refused(lambda: masks.read_pth(tmp_path / "m.pth", 10), "m.pth")


def test_a_tensor_larger_than_its_file(tmp_path):
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n"
    storage = b"(X\7\0\0\0storagectorch\nLongStorage\nX\1\0\0\0000X\3\0\0\0cpuK\2tQ"
    shape = b"J" + struct.pack("<i", 10**9)
    program = b"](](" + rebuild + b"(" + storage + b"K\0" + shape + b"\x85K\0\x85\x89NtRee."
    path = write_pickle(tmp_path / "m.pth", program)
    assert "larger than its file" in refused(lambda: masks.read_pth(path, 11008), "m.pth")
    many = [[np.zeros(5, np.int64)]]
    torch_file.write(many, path)
    assert "5 neurons of a layer of width 3" in refused(lambda: masks.read_pth(path, 3), "m.pth")
    refused(lambda: masks.read_pth(path, 10**12), "m.pth")
    refused(lambda: masks.read_pth(path, 100, domains=10**9), "m.pth")


def test_gigabytes_of_zeros_in_megabytes(tmp_path):
    zeros = b"\0" * 2**28
    path = write_pickle(tmp_path / "m.pth", b"].", zeros, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**20
    assert "compressed" in refused(lambda: torch_file.read(path), "m.pth")
    np.savez_compressed(tmp_path / "m.npz", domains=np.array(["a"]), x=np.zeros(2**26, bool))
    assert "compressed" in refused(lambda: masks.load(tmp_path / "m.npz"), "m.npz")


def npy(shape: str, descr: str = "|b1", data: bytes = b"") -> bytes:
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}}}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + data


@pytest.mark.parametrize("member", [
    npy("(10**9,)"), npy("(1, 1000000000000, 1)"), npy("(1, 1, 4)", data=b"\1\1"), npy("3"),
    npy("(-1, 2, 2)"), npy("(1, 1, 1)", "|O", pickle.dumps([1])), b"", b"\x93NUMPY\3\0", npy("(" * 500),
    npy("(1, 1, 1)", "<f8", b"\0" * 8),
])  # fmt: skip
def test_hostile_arrays_in_an_npz(tmp_path, member):
    domains = io.BytesIO()
    np.save(domains, np.array(["a"]))
    with zipfile.ZipFile(tmp_path / "m.npz", "w") as opened:
        opened.writestr("domains.npy", domains.getvalue())
        opened.writestr("x.npy", member)
    refused(lambda: masks.load(tmp_path / "m.npz"), "m.npz")


def safetensors_file(header: object, data: bytes = b"\0" * 16) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + data


def entry(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(("content", "says"), {
    "no header": (b"\0" * 7, "truncated or altered"),
    "a long header": (b"\xff" * 8 + b"{}", "truncated or altered"),
    "overlap": (safetensors_file({"a": entry([2], 0, 8), "b": entry([3], 4, 16)}), "b does not follow"),
    "a gap": (safetensors_file({"a": entry([2], 8, 16)}), "a does not follow"),
    "bytes behind": (safetensors_file({"a": entry([2], 0, 8)}), "end at"),
    "out of bounds": (safetensors_file({"a": entry([8], 0, 32)}), "end at"),
    "another size": (safetensors_file({"a": entry([3], 0, 16)}), r"F32 of \[3\] at \[0, 16\]"),
    "a huge shape": (safetensors_file({"a": entry([2**40, 2**40], 0, 16)}), "truncated or altered"),
    "negative": (safetensors_file({"a": entry([-4], 0, 16)}), "for a shape"),
    "booleans": (safetensors_file({"a": entry([True, 4], 0, 16)}), "for a shape"),
    "floats": (safetensors_file({"a": entry([4.0], 0, 16)}), "for a shape"),
    "twice": (safetensors_file(b'{"a":{},"a":{}}'), "'a' occurs twice"),
    "no dtype": (safetensors_file({"a": {"shape": [4], "data_offsets": [0, 16]}}), "has no dtype"),
    "fp8": (safetensors_file({"a": entry([16], 0, 16, "F8_E4M3")}), "holds 'F8_E4M3', only BF16"),
    "dtype a list": (safetensors_file({"a": entry([4], 0, 16, ["F32"])}), "only BF16"),
    "a list": (safetensors_file([1]), "truncated or altered"),
    "nested": (safetensors_file(b"[" * 10**6), "nested too deeply"),
    "latin-1": (safetensors_file(b'{"\xe9": 1}'), "truncated or altered"),
    "NaN": (safetensors_file(b'{"a": NaN}'), "truncated or altered"),
    "many axes": (safetensors_file({"a": entry([1] * 99 + [4], 0, 16)}), "truncated or altered"),
}.values())  # fmt: skip
def test_hostile_headers(directory, content, says):
    (directory / "model.safetensors").write_bytes(content)
    message = refused(lambda: load.read_model(directory), "model.safetensors")
    assert re.search(says, message), message


@pytest.mark.parametrize("places", [
    {"a": "../model.safetensors"}, {"a": "/etc/passwd"}, {"a": "."}, {"a": ""}, {"a": "x\0y"},
    {"a": ["model.safetensors"]}, {"a": None}, ["model.safetensors"], {}, "model.safetensors",
    {"\x1b[2J\u202e": 5},
])  # fmt: skip
def test_hostile_indices(directory, places):
    (directory / "model.safetensors").unlink()
    name = "model.safetensors.index.json"
    (directory / name).write_text(json.dumps({"weight_map": places}))
    refused(lambda: load.read_model(directory), name)


def test_names_of_a_hostile_file_in_one_short_line(directory):
    names = [f"\x1b[2Jlayers.{n}.\u202e\n" + "x" * 10**4 for n in range(200)]
    tensors = {name: np.zeros(1, np.float32) for name in names}
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    refused(lambda: load.read_model(directory), str(directory))


@pytest.mark.parametrize("content", {
    "empty": b"", "byte-order mark": b"\xef\xbb\xbf{}", "latin-1": b'{"a": "\xe9"}',
    "utf-16": '{"a": 1}'.encode("utf-16"), "nested": b"[" * 10**6, "deep": b'{"a":' * 10**5,
    "twice": b'{"model_type": "llava", "model_type": "llava"}', "a list": b"[]", "null": b"null",
    "NaN": b'{"a": NaN}', "cut": b'{"model_type": "ll', "digits": b'{"a": ' + b"9" * 5000 + b"}",
    "large": b" " * (17 * 2**20),
}.values())  # fmt: skip
def test_files_that_are_no_json(directory, content):
    (directory / "config.json").write_bytes(content)
    refused(lambda: load.read_model(directory), "config.json")


# Values that no field accepts, and some that some fields do.
HOSTILE = [
    None, [], {}, 0, -1, True, False, "x", "3", "", 1e999, -1e999, 10**30, 2.5, [4], {"a": 1}, 1e300,
    "a" * 10**6, 10**6, 10**12, [[[[1]]]],
]  # fmt: skip
# What each kind of field may be instead of what it was; all else must be refused.
FREE = {"architectures", "transformers_version"}


def parts(fields):
    """(path of a field, fields that hold it), of all fields."""
    for name, value in fields.items():
        yield name, fields
        if isinstance(value, dict):
            yield from ((f"{name}.{inner}", value) for inner in value)


def test_every_field_of_every_wrong_type(directory):
    """Accepted is what changes nothing, or is a value of the field's own type and range."""
    base = json.loads((directory / "config.json").read_text())
    known = load.read_config(directory)
    accepted = {}
    start = time.process_time()
    for path, _ in list(parts(base)):
        for value in HOSTILE:
            fields = json.loads(json.dumps(base))
            holder = dict(parts(fields))[path]
            before = holder[path.rpartition(".")[2]]
            holder[path.rpartition(".")[2]] = value
            if value == before and type(value) is type(before):
                continue
            text = json.dumps(fields).replace("Infinity", "1e999")
            (directory / "config.json").write_text(text)
            with damage.refusing("config.json"):
                found = load.read_config(directory)
                accepted.setdefault(path, []).append(value)
                if path in FREE:
                    assert found == known
    assert time.process_time() - start < 60
    for path, values in accepted.items():
        if path not in FREE:
            kind = dict(parts(base))[path][path.rpartition(".")[2]]
            for value in values:
                optional = value is None and path in OPTIONAL
                empty = value == {} and isinstance(kind, dict)
                assert optional or empty or type(value) is type(kind) or (
                    type(kind) is float and type(value) is int
                ), (path, value)  # fmt: skip
                assert value not in ("x", "3", "", 10**12, 10**30, 1e300, -1), (path, value)


OPTIONAL = {
    "text_config", "vision_config", "text_config.num_key_value_heads", "text_config.head_dim",
    "text_config.rope_theta",
}  # fmt: skip


@pytest.mark.parametrize(("fields", "says"), [
    ({"text_config": {"num_hidden_layers": 10**6}}, "one integer from 1 to 1024"),
    ({"projector_depth": 1000}, "one integer from 1 to 16"),
    ({"text_config": {"vocab_size": 10**12}}, "text_config.vocab_size=1000000000000"),
    ({"text_config": {"vocab_size": 10**7}}, "of another shape"),
    ({"text_config": {"num_hidden_layers": 1000}}, "missing"),
    ({"vision_config": {"image_size": 10**6}}, "vision_config.image_size=1000000"),
    ({"vision_config": {"image_size": 4092}}, "position_embedding.weight is"),
    ({"vision_config": {"patch_size": 0}}, "vision_config.patch_size=0"),
    ({"vision_config": {"patch_size": 5}}, "not a multiple of patch_size=5"),
    ({"vision_config": {"num_attention_heads": 5}}, "hidden_size=32 is not a multiple of"),
    ({"text_config": {"num_attention_heads": 5}}, "is not a multiple of num_key_value_heads"),
    ({"text_config": {"head_dim": 7}}, "heads of odd width 7"),
    ({"vision_feature_layer": 0}, "vision_feature_layer=0: the vision tower has"),
    ({"text_config": {"rms_norm_eps": "x"}}, "rms_norm_eps='x' is not supported, only a number"),
    ({"text_config": {"num_attention_heads": "3"}}, "num_attention_heads='3'"),
    ({"text_config": {"model_type": "mixtral"}}, "model_type='mixtral' is not supported, only 'llama'"),
    ({"model_type": "fuyu"}, "is not supported, only llava, llava_next"),
    ({"model_type": ["llava"]}, "is not supported, only llava, llava_next"),
    ({"image_token_index": True}, "image_token_index=True"),
    ({"eos_token_id": "</s>"}, "eos_token_id='</s>'"),
    ({"text_config": {"rope_scaling": [1]}}, "text_config.rope_scaling="),
    ({"text_config": {"rope_parameters": {"rope_theta": "x"}}}, "rope_parameters.rope_theta='x'"),
])  # fmt: skip
def test_configs_that_no_model_has(directory, fields, says):
    path = directory / "config.json"
    base = json.loads(path.read_text())
    for name, value in fields.items():
        base[name] = base[name] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(base))
    message = refused(lambda: load.read_model(directory), str(directory))
    assert says in message, message


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8", "compressed-tensors"])
@pytest.mark.parametrize("place", ["", "text_config"])
def test_quantised_weights_are_refused_by_name(directory, method, place):
    path = directory / "config.json"
    base = json.loads(path.read_text())
    (base[place] if place else base)["quantization_config"] = {"quant_method": method, "bits": 4}
    path.write_text(json.dumps(base))
    message = refused(lambda: load.read_model(directory), "config.json")
    assert f"quantised by '{method}' are not read" in message and "dequantize()" in message
    assert "unknown field" not in message


@pytest.mark.parametrize("kind", [
    "mlp999999999x_gelu", "mlp17x_gelu", "mlp0x_gelu", "mlp-1x_gelu", ["linear"], None, 3,
])  # fmt: skip
def test_projectors_of_the_original_layout(checkpoints, tmp_path, kind):
    shutil.copytree(checkpoints[0] / "original", tmp_path / "o")
    path = tmp_path / "o" / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mm_projector_type": kind}))
    assert "mm_projector_type=" in refused(lambda: load.read_model(path.parent), "config.json")


PICTURES = {
    "image_processor_type": "CLIPImageProcessor", "do_resize": True, "do_center_crop": True,
    "size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}, "resample": 3,
    "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5], "image_std": [0.2, 0.2, 0.2], "processor_class": "LlavaProcessor",
}  # fmt: skip


@pytest.mark.parametrize(("change", "says"), [
    ({"size": {"shortest_edge": 40000}}, "size.shortest_edge=40000"),
    ({"size": {"longest_edge": 40000}}, "size.longest_edge=40000"),
    ({"size": 40000}, "size=40000"),
    ({"crop_size": {"height": 336, "width": 336}}, "crop_size.height=336"),
    ({"crop_size": 48}, "makes pictures of 48 pixels, but the vision tower reads 24"),
    ({"crop_size": None, "size": {"height": 48, "width": 24}}, "makes pictures of 48 pixels"),
    ({"size": {"shortest": 24}}, "unknown field size.shortest"),
    ({"image_mean": [0.5, 0.5]}, "image_mean"),
    ({"image_mean": "x"}, "image_mean='x'"),
    ({"image_std": [0, 1, 1]}, "image_std"),
    ({"resample": 9}, "resample=9"),
    ({"rescale_factor": "1/255"}, "rescale_factor"),
    ({"do_resize": "yes"}, "do_resize='yes'"),
    ({"do_normalise": True}, "unknown field do_normalise (nearest: do_normalize)"),
    ({"image_grid_pinpoints": [[10**9, 24]]}, "image_grid_pinpoints"),
    ({"image_processor_type": 5}, "image_processor_type=5"),
])  # fmt: skip
def test_settings_of_pictures(tmp_path, change, says):
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(PICTURES | {"auto_map": {"AutoImageProcessor": "x.Y"}}))
    settings.check(tmp_path, tmp_path, 24)
    path.write_text(json.dumps(PICTURES | change))
    message = refused(lambda: settings.check(tmp_path, tmp_path, 24), path.name)
    assert says in message, message
    path.unlink()
    path = tmp_path / "processor_config.json"
    path.write_text(json.dumps({"image_processor": PICTURES | change}))
    message = refused(lambda: settings.check(tmp_path, tmp_path, 24), path.name)
    assert "image_processor." in message or "makes pictures" in message


@pytest.mark.parametrize("content", [
    '{"eos_token_id": "x"}', '{"eos_token_id": [1, "2"]}', '{"eos_token_id": -1}', "[]", "{", "",
    '{"eos_token_id": true}', '{"pad_token_id": 1.5}',
])  # fmt: skip
def test_settings_of_generation(tmp_path, content):
    path = tmp_path / "generation_config.json"
    path.write_text('{"eos_token_id": [1, 2], "temperature": 0.5, "pad_token_id": null}')
    settings.check(tmp_path, tmp_path, 24)
    path.write_text(content)
    refused(lambda: settings.check(tmp_path, tmp_path, 24), path.name)


@pytest.mark.parametrize("name", [
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja",
    "special_tokens_map.json", "generation_config.json", "preprocessor_config.json",
    "qformer_tokenizer/tokenizer.json",
])  # fmt: skip
def test_no_pipe_is_opened_beside_the_model(directory, name):
    path = directory / name
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)
    assert "not a regular file" in refused(lambda: load.load(directory), path.name)


def test_a_line_stays_a_line():
    assert files.line("a\nb\x1b\u202e") == r"a\nb\x1b\u202e"
    assert len(files.line("\x00" * 10**7)) == files.LINE
    assert files.some(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"
    message = files.refusal("f" * 500, ["x" * 300] * 20)
    assert len(message) <= files.LINE and message.endswith(" more")
    assert files.refusal("f", ["a", "b"]) == "f: a; b"
    nested: list = []
    for _ in range(100):
        nested = [nested, nested]
    assert len(files.shown(nested)) <= 60
    assert files.shown(10**5000) == "a int"


def test_one_is_not_true():
    assert not schema.only(True).accepts(1) and not schema.only(1).accepts(True)
    assert not schema.whole(0, 2).accepts(1.0)
    assert schema.real(0, 1).accepts(1) and not schema.real(0, 1).accepts(float("nan"))


def test_saved_models_pass_the_schema(tiny_model, tmp_path):
    load.read_config(save.save_hf(tiny_model, None, tmp_path / "m"))
