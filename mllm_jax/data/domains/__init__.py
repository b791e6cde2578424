"""Visual domains: named sets of images with questions, embedded ones and the user's own.

    found = domains.embedded("test")             # {"objects": Domain, "medical": Domain, ...}
    mine = domains.Domain.from_folder("birds")   # birds/<label>/*.jpg

The embedded domains are built once from packages (mllm_jax/data/embedded) into array_record files
in the user's cache. A Domain is a sequence, so it is a data source for Grain as it stands.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import importlib
import json
import os
import pathlib
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence

import tqdm

from mllm_jax.data import packages
from mllm_jax.data.domains import conversations, folder, table
from mllm_jax.data.domains.examples import Example, Files, Row
from mllm_jax.data.embedded import questions as questions_lib
from mllm_jax.data.embedded import recipe as recipe_lib
from mllm_jax.processors import files, pictures
from mllm_jax.store import stamps

Question = questions_lib.Question

EMBEDDED = tuple(questions_lib.KINDS)
SPLITS = ("test", "train")
VERSION = "1"  # of what is built; another version is another folder of the cache
IMAGE_ENDINGS = pictures.ENDINGS


def known(what: str, name: str, names: Sequence[str]) -> str:
    """The name, if it is one of those that there are."""
    if name not in names:
        raise ValueError(f"unknown {what} {name!r}; there are {', '.join(names)}")
    return name


class Domain(Sequence):
    """A named, ordered set of examples.

    The embedded domains are ordered so that labels alternate: any beginning is balanced.

    Args:
      name: "medical".
      split: "test", "train" or what the user calls it.
      examples: anything with a length that gives an Example by index.
    """

    def __init__(self, name: str, split: str, examples: Sequence[Example]):
        if not len(examples):
            raise ValueError(f"domain {name!r} ({split}) is empty: it needs an example or more")
        self.name = name
        self.split = split
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index):
        """One example, or a domain of those that a slice selects."""
        if isinstance(index, slice):
            chosen = [self._examples[i] for i in range(len(self))[index]]
            return Domain(self.name, self.split, chosen)
        return self._examples[range(len(self))[index]]

    def __iter__(self) -> Iterator[Example]:
        return (self._examples[index] for index in range(len(self)))

    def __repr__(self) -> str:
        return f"Domain({self.name!r}, {self.split!r}, {len(self)} examples)"

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of all images and questions in their order, for manifests.

        Of the data sets of paper A, what they say of their files.
        """
        if known := getattr(self._examples, "fingerprint", None):
            return known
        digest = hashlib.sha256()
        for example in self:
            digest.update(_pack(example))
        return digest.hexdigest()

    @classmethod
    def from_folder(
        cls,
        path: str | os.PathLike,
        question: str | None = None,
        name: str | None = None,
        split: str = "test",
    ) -> Domain:
        """A domain out of `path/<label>/<image>`; the folder's name is the label.

        Args:
          path: the folder.
          question: asked instead of the built-in wordings of the category question.
          name: the domain's name; the folder's by default.
          split: the split's name.

        Returns:
          The domain, ordered by path; images are read when they are asked for.
        """
        name = name or pathlib.Path(path).resolve().name
        return cls(name, split, Files(name, folder.read(pathlib.Path(path), name, question)))

    @classmethod
    def from_csv(
        cls, path: str | os.PathLike, name: str | None = None, split: str = "test"
    ) -> Domain:
        """A domain out of a table with the columns image, question and answer.

        Cells are divided by commas, semicolons or tabs, as the header is. `image` is a path,
        relative to the table's folder. Rows with the same image are questions about one example.
        Optional columns: options (separated by `|`), style, label, id, licence.
        """
        return cls._from_table(path, name, split, table.from_csv)

    @classmethod
    def from_jsonl(
        cls, path: str | os.PathLike, name: str | None = None, split: str = "test"
    ) -> Domain:
        """A domain out of a file with one JSON object a line, with the same fields as `from_csv`.

        `options` is a list here. Objects may have LLaVA's `conversations`, see `from_json`.
        """
        return cls._from_table(path, name, split, table.from_jsonl)

    @classmethod
    def from_json(
        cls, path: str | os.PathLike, name: str | None = None, split: str = "test"
    ) -> Domain:
        """A domain out of a JSON list of objects, such as LLaVA's training data.

        An object has an `image`, relative to the file's folder, and `conversations`, of which the
        first question and its answer are read, or the same fields as in `from_jsonl`.
        """
        return cls._from_table(path, name, split, table.from_json)

    @classmethod
    def _from_table(cls, path, name, split, read) -> Domain:
        name = name or pathlib.Path(path).stem
        return cls(name, split, Files(name, _table_rows(pathlib.Path(path), name, read)))


def _table_rows(path: pathlib.Path, name: str, read) -> list[Row]:
    return table.grouped(name, path, conversations.flattened(path, read(path)))


def require_domains(domains: Mapping[str, Domain], at_least: int = 2) -> None:
    """Refuses a study that compares domains when there are too few.

    Args:
      domains: by name.
      at_least: how many the study needs.
    """
    if len(domains) < at_least:
        raise ValueError(
            f"this study compares domains and needs {at_least} or more, but there are "
            f"{len(domains)}: {sorted(domains) or 'none'}"
        )


def embedded(
    split: str = "test",
    domains: Sequence[str] | None = None,
    root: str | os.PathLike | None = None,
) -> dict[str, Domain]:
    """The embedded domains; built on first use, about two minutes.

    Args:
      split: "test" or "train".
      domains: names out of EMBEDDED; all by default. A domain that is asked for by name and cannot
        be built is an error, otherwise it is named in one line and left out.
      root: where they are kept; the user's cache by default.

    Returns:
      Domains by name, in the order asked for.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; the embedded domains have {list(SPLITS)}")
    if unknown := [name for name in domains or () if name not in EMBEDDED]:
        raise ValueError(f"unknown domain {unknown[0]!r}; embedded are {list(EMBEDDED)}")
    root = default_root() if root is None else pathlib.Path(root)
    found = {}
    for name in domains or EMBEDDED:
        try:
            build(name, root)
        except packages.MissingPackage as error:
            if domains is not None:
                raise
            print(f"domain {name!r} is left out: {error}", file=sys.stderr, flush=True)
        else:
            found[name] = Domain(name, split, _Records(root / name / f"{split}.array_record"))
    return found


TABLES = {
    ".csv": table.from_csv,
    ".tsv": table.from_csv,
    ".jsonl": table.from_jsonl,
    ".json": table.from_json,
}


def own(paths: Sequence[str | os.PathLike], split: str = "test") -> dict[str, Domain]:
    """A user's domains: each path is a folder, or a table (see TABLES), named by its stem.

    A quarter of the examples, chosen by the hash of their id, is the test split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; own domains have {list(SPLITS)}")
    found = {}
    for path in map(pathlib.Path, paths):
        name, rows = _own_rows(path)
        if name in found:
            raise ValueError(f"two domains are named {name!r}; rename one of {list(paths)}")
        part = [row for row in rows if (_hash(row.id) % 4 == 0) == (split == "test")]
        if not part:
            raise ValueError(
                f"domain {name!r} is empty in its {split} split: {files.name(path)} has only "
                f"{len(rows)} examples, and a quarter of them is for testing"
            )
        found[name] = Domain(name, split, Files(name, part))
    return found


def _own_rows(path: pathlib.Path) -> tuple[str, list[Row]]:
    """The name and the examples of a folder or a table."""
    read = TABLES.get(path.suffix.lower())
    if path.is_dir() or (not path.exists() and read is None):
        name = path.resolve().name
        return name, folder.read(path, name, None)
    if read is None:
        raise ValueError(
            f"domain {files.name(path)} is no folder and no table: its ending must be one of "
            f"{', '.join(TABLES)}"
        )
    return path.stem, _table_rows(path, path.stem, read)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def default_root() -> pathlib.Path:
    return packages.cache_directory() / "domains" / VERSION


def recipe(name: str) -> recipe_lib.Recipe:
    """How an embedded domain is made."""
    try:
        return importlib.import_module(f"mllm_jax.data.embedded.{name}").RECIPE
    except ImportError as error:
        wheel = {"shapefile": "pyshp"}.get(error.name, error.name)
        raise packages.MissingPackage(
            f"domain {name!r} needs the package {wheel!r}: pip install {wheel}"
        ) from error


def build(name: str, root: pathlib.Path) -> dict:
    """Builds one embedded domain under `root/name`, unless it is there.

    All files are written to a hidden folder, read back, and moved into place at once: a build that
    is killed, or a disk that fills up, leaves no half domain behind.

    Returns:
      The index: counts, sources, licences, what was missing.
    """
    index = root / name / "index.json"
    if index.is_file():
        return _checked(name, root / name)
    made = recipe(name)
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(root)
        partial = pathlib.Path(tempfile.mkdtemp(prefix=f".{name}.partial.", dir=root))
    except OSError as error:
        raise _unwritable(root, error) from error
    try:
        result = _write(made, partial)
        try:
            os.replace(partial, root / name)
        except OSError:  # another process was faster
            if not index.is_file():
                raise
    except OSError as error:
        raise _unwritable(root, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for line in result["missing"]:
        print(f"domain {name!r} is built without a part: {line}", file=sys.stderr, flush=True)
    return result


def _checked(name: str, folder: pathlib.Path) -> dict:
    """The index of a domain that is there, whose pictures and questions are those it names."""
    mend = f"delete {folder} to build it again"
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        splits = {f"{s}.array_record": index["splits"][s]["fingerprint"] for s in SPLITS}
        whose = index["domain"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder / 'index.json'} is damaged; {mend}") from error
    if whose != name:
        raise ValueError(f"{folder} holds the domain {whose!r}; {mend}")
    if (
        wrong := stamps.check(folder, splits, functools.partial(_fingerprint_of, name))
    ) is not None:
        raise ValueError(f"{folder / wrong}: its pictures are not those that were written; {mend}")
    return index


def _fingerprint_of(name: str, path: pathlib.Path) -> str:
    """Of the examples in a file; none where one of them cannot be read."""
    records = _Records(path)
    try:
        return Domain(name, path.stem, records).fingerprint
    except (ValueError, KeyError, TypeError, RuntimeError, IndexError):
        return ""


def _write(made: recipe_lib.Recipe, folder: pathlib.Path) -> dict:
    from array_record.python import array_record_module

    started = time.monotonic()
    bar = tqdm.tqdm(total=made.size, desc=f"{made.name}: reading packages", unit="image")
    with bar:
        candidates, missing = recipe_lib.find(made)
        bar.set_description(made.name)
        splits = {split: [] for split in SPLITS}
        for split, picture in recipe_lib.choose(made, candidates):
            splits[split].append(_example(made, picture))
            bar.update()
        bar.total = bar.n
    files = {}
    for split, examples in splits.items():
        path = folder / f"{split}.array_record"
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        for example in examples:
            writer.write(_pack(example))
        writer.close()
        written = Domain(made.name, split, _Records(path))
        if written.fingerprint != Domain(made.name, split, examples).fingerprint:
            raise OSError(f"{path.name} reads back differently")
        files[split] = {
            "examples": len(examples),
            "bytes": path.stat().st_size,
            "fingerprint": written.fingerprint,
            "labels": dict(sorted(collections.Counter(e.label for e in examples).items())),
            "licences": dict(sorted(collections.Counter(e.licence for e in examples).items())),
        }
    index = {
        "domain": made.name,
        "kind": questions_lib.KINDS[made.name],
        "splits": files,
        "sources": [
            {
                "origin": source.origin,
                "name": source.name,
                "version": source.found_version,
                "licence": source.licence,
                "homepage": source.homepage,
            }
            for source in made.sources
        ],
        "note": made.note,
        "missing": missing,
        "seconds": round(time.monotonic() - started, 1),
    }
    (folder / "index.json").write_text(json.dumps(index, indent=1, ensure_ascii=False))
    return index


def _example(made: recipe_lib.Recipe, picture: recipe_lib.Picture) -> Example:
    candidate = picture.candidate
    return Example(
        id=candidate.name,
        domain=made.name,
        label=candidate.label,
        encoded=recipe_lib.jpeg(picture.image),
        questions=questions_lib.questions_for(
            f"{made.name} {candidate.name}",
            candidate.label,
            made.family(candidate.label).labels,
            questions_lib.KINDS[made.name],
        ),
        source=candidate.source,
        licence=candidate.licence,
    )


def _remove_abandoned(root: pathlib.Path, hours: float = 2.0) -> None:
    """Removes what killed builds left; a build that runs beside this one is younger."""
    for left in root.glob(".*.partial.*"):
        if time.time() - left.stat().st_mtime > 3600 * hours:
            shutil.rmtree(left, ignore_errors=True)


def _unwritable(root: pathlib.Path, error: OSError) -> OSError:
    return OSError(
        error.errno,
        f"cannot write the domains to {root} ({error.strerror or error}): make room, or set "
        f"MLLM_JAX_CACHE to another folder",
    )


def _pack(example: Example) -> bytes:
    """One record: the length of a JSON header in four bytes, the header, the image."""
    fields = {f.name: getattr(example, f.name) for f in dataclasses.fields(example)}
    encoded = fields.pop("encoded")
    fields["questions"] = [dataclasses.asdict(question) for question in example.questions]
    header = json.dumps(fields, ensure_ascii=False, sort_keys=True).encode()
    return len(header).to_bytes(4, "big") + header + encoded


def _unpack(record: bytes) -> Example:
    size = 4 + int.from_bytes(record[:4], "big")
    fields = json.loads(record[4:size])
    fields["questions"] = tuple(
        Question(**{**question, "options": tuple(question["options"])})
        for question in fields["questions"]
    )
    return Example(**fields, encoded=record[size:])


class _Records(Sequence):
    """Examples in an array_record file, read one by one."""

    def __init__(self, path: pathlib.Path):
        from array_record.python import array_record_data_source

        try:
            self._source = array_record_data_source.ArrayRecordDataSource(str(path))
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{path} cannot be read ({error}): delete its folder to build it again"
            ) from error

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        return _unpack(self._source[index])
