"""Create the environments of the rivals, with pinned versions.

python -m benchmarks.install [--rivals=hf_careful,nnsight] [--environments=DIR]
"""

from __future__ import annotations

import argparse
import pathlib
import subprocess
import venv

from benchmarks import harness

REQUIREMENTS = pathlib.Path(__file__).parent / "rivals" / "requirements"


def install(name: str, environments: pathlib.Path) -> None:
    """Create an environment, or update it to the pinned versions."""
    directory = environments / name
    if not (directory / "bin" / "python").exists():
        venv.create(directory, with_pip=True)
    command = [str(directory / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    subprocess.run([*command, "-r", str(REQUIREMENTS / f"{name}.txt")], check=True)
    print(f"{name}: {directory}")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rivals", default=",".join(harness.ENVIRONMENT))
    parser.add_argument("--environments", type=pathlib.Path, default=harness.ENVIRONMENTS)
    args = parser.parse_args()
    for name in sorted({harness.ENVIRONMENT[rival] for rival in args.rivals.split(",")}):
        install(name, args.environments)


if __name__ == "__main__":
    main()
