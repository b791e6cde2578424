"""Keep compiled programs for the next start of a study: JAX's persistent compilation cache."""

from __future__ import annotations

import os
import pathlib
import platform


def keep(folder: str | None) -> None:
    """Keep every compiled program in a folder; `JAX_COMPILATION_CACHE_DIR` goes before it.

    Args:
      folder: The folder; None is `default_folder()`, and "" keeps nothing.
    """
    import jax

    if folder == "" or (folder is None and os.environ.get("JAX_COMPILATION_CACHE_DIR")):
        return
    jax.config.update("jax_compilation_cache_dir", str(folder or default_folder()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def default_folder() -> pathlib.Path:
    """Return a folder in the cache of the library, one for each kind of CPU.

    A program compiled for a CPU uses its instructions, of which JAX's key says nothing; machines
    of several kinds may share a home folder.
    """
    from mllm_jax import store

    cpu = store.fingerprint(platform.machine(), platform.processor(), _instructions())
    return store.cache_directory() / "compiled" / cpu[:12]


def _instructions() -> list[str]:
    """Return the line of Linux that lists the instructions of the CPU; empty elsewhere."""
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return [line for line in lines if line.lower().startswith(("flags", "features"))][:1]
