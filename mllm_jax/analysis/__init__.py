"""Analysis, one idea per file: pure functions of arrays, and methods that run passes.

Statistics, selections and tests take arrays and know neither models nor files. Methods that explain
a metric run passes of their own: those of a `contrasts.Contrast` (`patching`, `paths`, `edges`,
`circuits`), `picture_attribution`, `direct_logits`, `patchscope`, `fidelity` and `steering`.
"""
