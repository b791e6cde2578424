"""Keep compiled programs for later runs of a study, in JAX's persistent compilation cache."""

from __future__ import annotations

import os
import pathlib
import platform


def keep(folder: str | None) -> None:
    """Keep every compiled program in a folder; `JAX_COMPILATION_CACHE_DIR` has precedence.

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

    A program compiled for a CPU uses its instruction set, which is not part of JAX's cache key;
    machines of several kinds may share a home folder.
    """
    from mllm_jax import store

    cpu = store.fingerprint(platform.machine(), platform.processor(), _instructions())
    return store.cache_directory() / "compiled" / cpu[:12]


def _instructions() -> list[str]:
    """Return the line of /proc/cpuinfo with the instruction set; empty if not on Linux."""
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return [line for line in lines if line.lower().startswith(("flags", "features"))][:1]
