"""Folders of a user: what is a label, what is an image, and what is said of the rest."""

from __future__ import annotations

import logging
import os

import PIL.Image
import pytest

from mllm_jax.data import domains


@pytest.fixture
def folder(tmp_path):
    for path in ("owl/0.png", "owl/1.PNG", "owl/2.jfif", "tit/3.JPG", "tit/4.Jpeg", "tit/5.tif"):
        write(tmp_path / "birds" / path)
    return tmp_path / "birds"


def write(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = {"png": "PNG", "tif": "TIFF"}.get(path.suffix.lower()[1:], "JPEG")
    PIL.Image.new("RGB", (5, 5), "red").save(path, kind)


def said(caplog, folder) -> str:
    with caplog.at_level(logging.WARNING):
        domain = domains.Domain.from_folder(folder)
    assert [e.id for e in domain] == [
        "owl/0.png", "owl/1.PNG", "owl/2.jfif", "tit/3.JPG", "tit/4.Jpeg", "tit/5.tif",
    ]  # fmt: skip
    assert {e.label for e in domain} == {"owl", "tit"}
    assert all(e.image.size == (5, 5) for e in domain)
    assert len(caplog.messages) <= 1
    return "".join(caplog.messages)


def test_endings_in_any_case_and_nothing_to_say(folder, caplog):
    assert said(caplog, folder) == ""


def test_leftovers_of_systems_are_no_labels_and_no_images(folder, caplog):
    for path in (
        ".ipynb_checkpoints/0-checkpoint.png", "__MACOSX/owl/._0.png", ".git/a.png", "@eaDir/0.jpg",
        "owl/._0.jpg", "owl/.DS_Store", "owl/Thumbs.db", "owl/.ipynb_checkpoints/0.png",
        "tit/@eaDir/0.png", "tit/desktop.ini", "THUMBS.DB",
    ):  # fmt: skip
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"no picture")
    assert said(caplog, folder).endswith("birds: 11 files not used: hidden or system 11")


def test_labels_that_look_alike_are_named(folder, caplog):
    write(folder / "Owl" / "0.png")
    domains.Domain.from_folder(folder)
    assert "the labels 'Owl' and 'owl' differ in case, spaces or Unicode form" in caplog.text


def test_all_else_is_counted_by_what_it_is(folder, caplog):
    for path in ("owl/a.txt", "owl/b.TXT", "tit/c.heic", "tit/README"):
        (folder / path).write_text("")
    write(folder / "loose.png")
    write(folder / "owl" / "more" / "deep.png")
    write(folder / "owl" / "more" / "deeper" / "deep.png")
    (folder / "tit" / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "tit" / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(folder / "tit" / "pipe.png")
    (folder / "tit" / os.fsdecode(b"\xff.png")).write_bytes(b"")
    assert said(caplog, folder).endswith(
        "birds: 11 files not used: .heic 1, .txt 2, beside the folders 1, in deeper folders 2, "
        "not regular 3, with names that are not UTF-8 1, without an extension 1"
    )


def test_an_empty_domain_says_what_was_there(tmp_path):
    (tmp_path / "d" / "owl").mkdir(parents=True)
    (tmp_path / "d" / "owl" / "a.heic").write_text("")
    write(tmp_path / "d" / "b.png")
    with pytest.raises(
        ValueError, match=r"empty: .*d holds no images .*; 2 files .*\.heic 1, besi"
    ):
        domains.Domain.from_folder(tmp_path / "d")


def test_what_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    for name in ("file", "pipe"):
        with pytest.raises(FileNotFoundError, match="is not a folder"):
            domains.Domain.from_folder(tmp_path / name)
        with pytest.raises(ValueError, match=r"neither a folder nor a table.*\.csv, \.tsv"):
            domains.load_user_domains([tmp_path / name])
    with pytest.raises(FileNotFoundError, match="does not exist"):
        domains.load_user_domains([tmp_path / "absent"])


def test_own_reads_no_picture_until_it_is_asked_for(tmp_path, monkeypatch):
    for number in range(40):
        write(tmp_path / "birds" / "ab"[number % 2] / f"{number}.png")
    whole = {e.id for e in domains.Domain.from_folder(tmp_path / "birds")}
    with monkeypatch.context() as patch:
        patch.setattr(domains.examples.files, "read_bytes", lambda *_: pytest.fail("read"))
        parts = [
            domains.load_user_domains([tmp_path / "birds"], split)["birds"]
            for split in domains.SPLITS
        ]
    ids = [{e.id for e in part} for part in parts]
    assert ids[0] | ids[1] == whole
    assert not ids[0] & ids[1]
    assert len(ids[0]) == sum(domains.user.is_test(i) for i in whole)


def test_a_damaged_index_is_named(tmp_path):
    for content in (b"", b"{", b"[]", b"\xff\xfe", b"[" * 10**5):
        path = tmp_path / "objects" / "index.json"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"index\.json is damaged; delete .*objects to build"):
            domains.build("objects", tmp_path)
