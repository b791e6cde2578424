"""Visual domains: named sets of images with questions, the embedded ones and a user's.

    found = domains.embedded("test")             # {"objects": Domain, "medical": Domain, ...}
    mine = domains.Domain.from_folder("birds")   # birds/<label>/*.jpg

The embedded domains are built once from packages (mllm_jax/data/embedded) into array_record files
in the user's cache. A Domain is a sequence, so it is a data source for Grain as it stands.
"""

from __future__ import annotations

import functools

from mllm_jax import deprecated
from mllm_jax.data.domains.builder import EMBEDDED, build, default_root, embedded, recipe
from mllm_jax.data.domains.domain import Domain, require_domains, require_known
from mllm_jax.data.domains.examples import Example, FileExamples, Row
from mllm_jax.data.domains.records import SPLITS, VERSION
from mllm_jax.data.domains.user import TABLES, load_user_domains
from mllm_jax.data.embedded.questions import Question
from mllm_jax.processors.pictures import EXTENSIONS as IMAGE_EXTENSIONS

__all__ = [
    "EMBEDDED",
    "IMAGE_EXTENSIONS",
    "SPLITS",
    "TABLES",
    "VERSION",
    "Domain",
    "Example",
    "FileExamples",
    "Question",
    "Row",
    "build",
    "default_root",
    "embedded",
    "load_user_domains",
    "recipe",
    "require_domains",
    "require_known",
]

__getattr__ = functools.partial(deprecated.member, __name__)
