"""Visual domains: named sets of images with questions, embedded ones and the user's own.

    found = domains.embedded("test")             # {"objects": Domain, "medical": Domain, ...}
    mine = domains.Domain.from_folder("birds")   # birds/<label>/*.jpg

The embedded domains are built once from packages (mllm_jax/data/embedded) into array_record files
in the user's cache. A Domain is a sequence, so it is a data source for Grain as it stands.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import functools
import hashlib
import importlib
import io
import json
import os
import pathlib
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence

import PIL.Image
import tqdm

from mllm_jax.data import files, packages, pictures
from mllm_jax.data.embedded import questions as questions_lib
from mllm_jax.data.embedded import recipe as recipe_lib
from mllm_jax.store import stamps

Question = questions_lib.Question

EMBEDDED = tuple(questions_lib.KINDS)
SPLITS = ("test", "train")
VERSION = "1"  # of what is built; another version is another folder of the cache
IMAGE_ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@dataclasses.dataclass(frozen=True)
class Example:
    """One image with its questions.

    Attributes:
      id: unique in its domain.
      domain: its domain's name.
      label: what it shows.
      encoded: the image file's bytes.
      questions: what can be asked, with answers and options.
      source: where the image comes from.
      licence: of the image; empty when not known.
    """

    id: str
    domain: str
    label: str
    encoded: bytes = dataclasses.field(repr=False)
    questions: tuple[Question, ...]
    source: str = ""
    licence: str = ""

    @property
    def image(self) -> PIL.Image.Image:
        """The picture, RGB; transparency is laid on white."""
        try:
            return pictures.read(self.encoded)
        except ValueError as error:
            where = f"domain {files.name(self.domain, 40)!r}, example {files.name(self.id, 60)!r}"
            raise ValueError(
                f"{where}: the image {files.name(self.source, 100)} cannot be read "
                f"({files.reason(error.__cause__)}); replace or remove it"
            ) from error

    def ask(self, style: str) -> Question:
        """The first question of a style."""
        for question in self.questions:
            if question.style == style:
                return question
        styles = sorted({question.style for question in self.questions})
        raise ValueError(
            f"domain {self.domain!r}, example {self.id!r} has no question of style {style!r}; "
            f"it has {styles}"
        )


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
        root = pathlib.Path(path)
        if not root.is_dir():
            raise FileNotFoundError(f"domain folder {root} does not exist")
        name = name or root.resolve().name
        files = sorted(file for file in root.glob("*/*") if file.suffix.lower() in IMAGE_ENDINGS)
        labels = sorted({file.parent.name for file in files})
        rows = []
        for file in files:
            label = file.parent.name
            key = f"{label}/{file.name}"
            made = questions_lib.questions_for(f"{name} {key}", label, labels)
            if question is not None:
                made = tuple(
                    dataclasses.replace(q, prompt=question) if q.style == "category" else q
                    for q in made
                )
            rows.append(_Row(key, label, file, made))
        if not rows:
            raise ValueError(
                f"domain {name!r} is empty: {root} holds no images in folders named by their label "
                f"({root}/<label>/<image>)"
            )
        return cls(name, split, _Files(name, rows))

    @classmethod
    def from_csv(
        cls, path: str | os.PathLike, name: str | None = None, split: str = "test"
    ) -> Domain:
        """A domain out of a CSV table with the columns image, question and answer.

        `image` is a path, relative to the table's folder. Rows with the same image are questions
        about one example. Optional columns: options (separated by `|`), style, label, id, licence.
        """
        path = pathlib.Path(path)
        with _opened(path) as file:
            reader = csv.DictReader(file)
            _require_columns(reader.fieldnames or (), f"table {path}", "columns")
            rows = [
                (
                    f"{path}, line {reader.line_num}",
                    {k: v for k, v in row.items() if v not in (None, "")},
                )
                for row in reader
            ]
        for _, row in rows:
            if "options" in row:
                row["options"] = [option.strip() for option in row["options"].split("|")]
        return cls(name or path.stem, split, _from_rows(name or path.stem, path, rows))

    @classmethod
    def from_jsonl(
        cls, path: str | os.PathLike, name: str | None = None, split: str = "test"
    ) -> Domain:
        """A domain out of a file with one JSON object a line, with the same fields as `from_csv`.

        `options` is a list here.
        """
        path = pathlib.Path(path)
        rows = []
        with _opened(path) as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
                if not isinstance(row, dict):
                    raise ValueError(f"{path}, line {number}: not a JSON object")
                rows.append((f"{path}, line {number}", row))
        return cls(name or path.stem, split, _from_rows(name or path.stem, path, rows))


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


def own(paths: Sequence[str | os.PathLike], split: str = "test") -> dict[str, Domain]:
    """A user's domains: each path is a folder, a .csv or a .jsonl, named by its stem.

    A quarter of the examples, chosen by the hash of their id, is the test split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; own domains have {list(SPLITS)}")
    found = {}
    for path in map(pathlib.Path, paths):
        made = _READERS.get(path.suffix, Domain.from_folder)(path, split=split)
        if made.name in found:
            raise ValueError(f"two domains are named {made.name!r}; rename one of {list(paths)}")
        half = [e for e in made if (_hash(e.id) % 4 == 0) == (split == "test")]
        if not half:
            raise ValueError(
                f"domain {made.name!r} is empty in its {split} split: {path} has only {len(made)} "
                "examples, and a quarter of them is for testing"
            )
        found[made.name] = Domain(made.name, split, half)
    return found


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


_READERS = {".csv": Domain.from_csv, ".jsonl": Domain.from_jsonl}


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
        index = json.loads((folder / "index.json").read_text())
        splits = {f"{s}.array_record": index["splits"][s]["fingerprint"] for s in SPLITS}
        whose = index["domain"]
    except (ValueError, KeyError, TypeError) as error:
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
    for folder in root.glob(".*.partial.*"):
        if time.time() - folder.stat().st_mtime > 3600 * hours:
            shutil.rmtree(folder, ignore_errors=True)


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


@dataclasses.dataclass(frozen=True)
class _Row:
    id: str
    label: str
    file: pathlib.Path
    questions: tuple[Question, ...]
    licence: str = ""


class _Files(Sequence):
    """Examples whose images are files of the user, read when asked for."""

    def __init__(self, domain: str, rows: Sequence[_Row]):
        self._domain = domain
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        row = self._rows[index]
        try:
            encoded = row.file.read_bytes()
        except OSError as error:
            raise ValueError(
                f"domain {self._domain!r}, example {row.id!r}: the image {row.file} cannot be read "
                f"({error.strerror})"
            ) from error
        return Example(
            row.id, self._domain, row.label, encoded, row.questions, str(row.file), row.licence
        )


def _opened(path: pathlib.Path) -> io.TextIOWrapper:
    try:
        return path.open(encoding="utf-8-sig", newline="")
    except OSError as error:
        raise FileNotFoundError(f"domain file {path} cannot be read: {error.strerror}") from error


def _require_columns(present: Sequence[str], where: str, what: str) -> None:
    needed = ("image", "question", "answer")
    if missing := [column for column in needed if column not in present]:
        raise ValueError(
            f"{where} lacks the {what} {missing}; it needs {list(needed)} and has {list(present)}"
        )


def _from_rows(name: str, path: pathlib.Path, rows: Sequence[tuple[str, dict]]) -> _Files:
    """Groups rows by image and fills in the options that a row does not name."""
    if not rows:
        raise ValueError(f"domain {name!r} is empty: {path} has no rows")
    answers = collections.defaultdict(list)
    for where, row in rows:
        _require_columns(list(row), where, "fields")
        answers[row.get("style", "category")].append(str(row["answer"]))
    by_image = collections.defaultdict(list)
    for where, row in rows:
        by_image[str(row["image"])].append((where, row))
    made = []
    for image, about in by_image.items():
        asked = []
        for where, row in about:
            answer, style = str(row["answer"]), row.get("style", "category")
            key = f"{name} {image} {row['question']}"
            options = row.get("options") or questions_lib.options_for(answer, answers[style], key)
            try:
                asked.append(Question(style, row["question"], answer, tuple(map(str, options))))
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
        first = about[0][1]
        made.append(
            _Row(
                id=str(first.get("id", image)),
                label=str(first.get("label", first["answer"])),
                file=path.parent / image,
                questions=tuple(asked),
                licence=str(first.get("licence", "")),
            )
        )
    return _Files(name, made)
