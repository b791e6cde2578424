"""What is wrong with a command line is told in one line, before JAX is imported."""

from __future__ import annotations

import fcntl
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import time

import pytest

from experiments.running import cli, fields, lock

ROOT = pathlib.Path(__file__).parents[2]
EVALUATE = "--config=configs/embedded_evaluate.py"


@pytest.fixture(scope="module")
def say(tmp_path_factory):
    """Runs `experiments.evaluate` where JAX cannot be imported; its one line."""
    poison = tmp_path_factory.mktemp("poison")
    (poison / "jax").mkdir()
    (poison / "jax" / "__init__.py").write_text("raise SystemExit('jax was imported')")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}

    def run(*given: str, study: str = "evaluate", **more: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", f"experiments.{study}", *given], cwd=ROOT, check=False, text=True,
            capture_output=True,
            env=environment | {"PYTHONPATH": f"{poison}{os.pathsep}{ROOT}"} | more,
        )  # fmt: skip
        assert done.returncode == 1, done
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: ") and len(line) < 400
        assert done.stdout == ""
        return line

    return run


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("", "--config is missing"),
        (EVALUATE, "--workdir is missing"),
        (f"{EVALUATE} --workdir=", "--workdir is missing"),
        ("--config=none.py --workdir=W", "--config=none.py: no such file"),
        ("--config none.py --workdir=W", "--config=none.py: no such file"),
        ("--config=configs --workdir=W", "--config=configs: it is a folder"),
        ("--config=configs/embedded.py:small --workdir=W", "embedded.py:small is not one of full, quick"),
        (f"{EVALUATE} --workdir=W --wrkdir=V", "unknown flag '--wrkdir'. Did you mean: workdir ?"),
        (f"{EVALUATE} --workdir", "Missing value for flag --workdir"),
        (f"{EVALUATE} --workdir=W extra", "unexpected arguments: extra"),
        (f"{EVALUATE} --workdir=setup.py", "--workdir=setup.py: it is a file"),
        (f"{EVALUATE} --workdir=W --config.modl=x", "the config has no field 'modl'"),
        (f"{EVALUATE} --workdir=W --config.batch_size=x", "--config.batch_size=x: invalid literal"),
        (f"{EVALUATE} --workdir=W --config.model=/no/model", "config.model=/no/model: neither a folder"),
        (f"{EVALUATE} --workdir=W --config.model=nomodel", "config.model=nomodel: neither a folder"),
        (f"{EVALUATE} --workdir=W --config.model=tests/nomodel", "config.model=tests/nomodel: neither"),
        (f"{EVALUATE} --workdir=W --config.model=tests", "config.model=tests: not a checkpoint: it has no config.json"),
        (f"{EVALUATE} --workdir=W --config.paths=('/no/pictures',)", "/no/pictures does not exist"),
        (f"{EVALUATE} --workdir=W --config.paths=(", "config.paths: ( does not exist"),
        (f"{EVALUATE} --workdir=W --mesh=2x4", "--mesh=2x4: write it as data=2,model=4,fsdp=1"),
        (f"{EVALUATE} --workdir=W --mesh=data=2,data=2", "write it as data=2,model=4"),
        (f"{EVALUATE} --workdir=W --mesh=data=0", "--mesh=data=0: data must be at least 1"),
        (f"{EVALUATE} --workdir=W --mesh=", "write it as data=2,model=4"),
        (f"{EVALUATE} --workdir=W --process=x", "--process=x: invalid literal"),
        (f"{EVALUATE} --workdir=W --process=0", "--process and --coordinator need --processes=N"),
        (f"{EVALUATE} --workdir=W --processes=2", "--processes=2: give a number, with --coordinator"),
        (f"{EVALUATE} --workdir=W --processes=two", "--processes=two: give a number, with"),
    ],
)  # fmt: skip
def test_flags_and_paths(given, says, say):
    assert says in say(*given.split())


FIELDS = [
    ("evaluate", "--config.batch_size=0", "config.batch_size=0 is not a whole number from 1"),
    ("evaluate", "--config.test_per_domain=-1", "config.test_per_domain=-1 is not a whole number"),
    ("evaluate", "--config.styles=('kind','kind')", "config.styles lists kind twice"),
    ("evaluate", "--config.domains=('medical',) --config.paths=('tests',)", "which config.paths replaces"),
    ("domain_neurons", "--config.margin=0.0", "config.margin=0.0 lies outside (0, 1)"),
    ("domain_neurons", "--config.margin=nan", "config.margin=nan is not a finite number"),
    ("domain_neurons", "--config.top_rate=1.5", "config.top_rate=1.5 lies outside (0, 1]"),
    ("domain_neurons", "--config.groups=0", "config.groups=0 is not a whole number from 1"),
    ("domain_neurons", "--config.controls=-1", "config.controls=-1 is not a whole number from 0"),
    ("domain_neurons", "--config.modules=('lm','lm')", "config.modules lists lm twice"),
    ("domain_neurons", "--config.deviation_layers=0", "config.deviation_layers=0 is not a whole"),
    ("projection", "--config.seeds=()", "config.seeds is empty: give one value or more"),
    ("projection", "--config.seeds=(0,0)", "config.seeds lists 0 twice"),
    ("projection", "--config.seeds=(-1,)", "config.seeds=-1 is not a whole number from 0"),
    ("projection", "--config.proj.recipe.rate=-1.0", "config.proj.recipe.rate=-1.0 is not a finite"),
    ("mask", "--config.penalty=inf", "config.penalty=inf is not a finite number"),
]  # fmt: skip


@pytest.mark.parametrize(("study", "given", "says"), FIELDS)
def test_values_of_fields(study, given, says, say):
    file = "embedded" if study == "domain_neurons" else f"embedded_{study}"
    flags = f"--config=configs/{file}.py --workdir=W {given}".split()
    assert says in say(*flags, study=study)


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("[!b]*.py"), key=str))
def test_the_fields_of_every_config_pass(file):
    fields.check(runpy.run_path(str(file))["get_config"]())


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("--coordinator=127.0.0.1 --processes=2 --process=0", "--coordinator=127.0.0.1: write it"),
        ("--coordinator=host:abc --processes=2 --process=0", "--coordinator=host:abc: write it"),
        ("--coordinator=host: --processes=2 --process=0", "--coordinator=host:: write it as"),
        ("--coordinator=:1234 --processes=2 --process=0", "--coordinator=:1234: write it as"),
        ("--coordinator=host:0 --processes=2 --process=0", "with a port of 1 to 65535"),
        ("--coordinator=host:70000 --processes=2 --process=0", "with a port of 1 to 65535"),
        ("--coordinator=host:-1 --processes=2 --process=0", "--coordinator=host:-1: write it"),
        ("--coordinator=host:1 --processes=2 --process=5", "--processes=2 it must be 0 to 1"),
        ("--coordinator=host:1 --processes=2 --process=-1", "--process=-1: with --processes=2"),
        ("--coordinator=host:1 --processes=0 --process=0", "--processes=0: it must be at least 1"),
        ("--coordinator=host:1 --processes=-2 --process=0", "--processes=-2: give a number"),
        ("--coordinator=host:1 --processes=2.5 --process=0", "--processes=2.5: give a number"),
    ],
)  # fmt: skip
def test_flags_of_several_processes(given, says, say):
    assert says in say(EVALUATE, "--workdir=W", *given.split())


def test_the_environment_says_the_same_as_flags(say):
    given = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1", "JAX_NUM_PROCESSES": "2"}
    line = say(EVALUATE, "--workdir=W", **given, JAX_PROCESS_ID="0")
    assert "--coordinator=127.0.0.1: write it as host:port" in line


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("def get_config(:\n", "line 1: SyntaxError: invalid syntax"),
        ("def get_confi():\n    pass\n", "it defines no get_config()"),
        ("import nothere\n", "No module named 'nothere'"),
        ("def get_config():\n    return 1 / 0\n", "ZeroDivisionError: division by zero"),
        ("def get_config():\n    pass\n", "get_config() does not return a ConfigDict"),
    ],
)
def test_config_files(source, says, say, tmp_path):
    (tmp_path / "config.py").write_text(source)
    line = say(f"--config={tmp_path}/config.py", "--workdir=W")
    assert says in line


@pytest.mark.parametrize(
    ("study", "config", "given", "says"),
    [
        ("train", "embedded_projector", "--edits=ablate lm.mlp.act", "this study does not support --edits"),
        ("train", "embedded_projector", "--config.projector=no.safetensors", "config.projector: no.saf"),
        ("projection", "embedded_projection", "--config.clip=/no/clip", "config.clip=/no/clip: neither"),
        ("projection", "embedded_projection", "--captures=fire=stats lm.mlp.act", "does not support --captures"),
        ("domain_neurons", "embedded", "--config.masks=no/{module}.pth", "config.masks: no/ does not"),
        ("sweep", "embedded_sweep", "--config.grd=x", "no field 'grd'; its file lists the fields. Did you mean"),
        ("mask", "embedded_mask", "--mesh=model", "--mesh=model: write it as"),
        ("das", "embedded_das", "--workdir=", "--workdir is missing"),
        ("attribution", "embedded_attribution", "--nothing", "unknown flag '--nothing'"),
    ],
)  # fmt: skip
def test_every_study(study, config, given, says, say):
    assert says in say(f"--config=configs/{config}.py", "--workdir=W", given, study=study)


@pytest.mark.parametrize(
    ("flag", "text", "says"),
    [
        ("edits", "abblate lm.mlp.act", "edit 1, 'abblate lm.mlp.act': an edit begins with one of"),
        ("edits", "ablate lm.embed >> ablate lm.mlp.akt", "edit 2, 'ablate lm.mlp.akt': unknown site"),
        ("edits", "ablate lm.mlp.act[12", "is not a site with an address"),
        ("edits", "scale lm.mlp.act two", "could not convert string to float: 'two'"),
        ("edits", "ablate lm.mlp.act[@none.npy]", "there is no file none.npy"),
        ("edits", "ablate lm.norm[1,2]", "lm.norm exists once, not per layer"),
        ("edits", "ablate lm.mlp.act where=imagee", "unknown token kind 'imagee'"),
        ("edits", "knockout lm.mlp.act", "only lm.attn and vision.attn take knockout"),
        ("edits", "", "an edit begins with one of"),
        ("captures", "stats lm.mlp.act", "a capture begins with its name"),
        ("captures", "a=mean lm.attn.pattern", "mean does not read lm.attn.pattern"),
    ],
)  # fmt: skip
def test_edits_and_captures(flag, text, says, say):
    line = say(EVALUATE, "--workdir=W", f"--{flag}={text}")
    assert line.startswith(f"error: --{flag}: ") and says in line


MODEL = "--model=llava-1.5-7b"


@pytest.mark.parametrize(
    ("program", "given", "says"),
    [
        ("describe", "", "--model is missing: --model=NAME"),
        ("describe", "--model=", "--model is missing"),
        ("describe", f"{MODEL} --jsn=x", "unknown flag '--jsn'. Did you mean: json ?"),
        ("describe", f"{MODEL} extra", "unexpected arguments: extra"),
        ("describe", "--model=/no/model", "--model=/no/model: neither a released model, a folder"),
        ("describe", "--model=tests/nomodel", "--model=tests/nomodel: neither a released model"),
        ("describe", "--model=setup.py", "--model=setup.py: neither a released model"),
        ("describe", "--model=tests", "--model=tests: not a checkpoint: it has no config.json"),
        ("describe", f"{MODEL} --base=tests", "--base=tests: not a checkpoint: it has no config.json"),
        ("describe", f"{MODEL} --json=tests", "--json=tests: it is a folder; give a file"),
        ("plan", "", "--model is missing"),
        ("plan", "--model=/no/model", "--model=/no/model: neither a released model"),
        ("plan", f"{MODEL} --workdir=W", "unknown flag '--workdir'"),
        ("plan", f"{MODEL} --rows=0", "--rows=0"),
        ("plan", f"{MODEL} --data=-1", "--data=-1"),
        ("plan", f"{MODEL} --lanes=two", "--lanes=two"),
        ("plan", f"{MODEL} --dtype=float16", "--dtype=float16: value should be one of <bfloat16|flo"),
        ("plan", f"{MODEL} --find=words", "--find=words: value should be one of <topology|rows|"),
        ("plan", f"{MODEL} --topology=v5e:3x3", "topology 'v5e:3x3': the slices of v5e are"),
        ("plan", f"{MODEL} --topology=v5e:2x4,tpu", "topology 'tpu': the chips are"),
        ("plan", f"{MODEL} --topology=h100:3", "topology 'h100:3': the slices of h100 are 1, 2, 4"),
        ("plan", f"{MODEL} --out=setup.py", "--out=setup.py: it is a file; give a folder"),
        ("plan", f"{MODEL} --edits=abblate", "--edits: edit 1, 'abblate'"),
        ("plan", f"{MODEL} --captures=stats", "--captures: "),
        ("domains", "--domain=animals", "unknown flag '--domain'. Did you mean: domains ?"),
        ("domains", "all", "unexpected arguments: all"),
        ("domains", "--root=setup.py", "--root=setup.py: it is a file; give a folder"),
        ("domains", "--licences=tests", "--licences=tests: it is a folder; give a file"),
    ],
)  # fmt: skip
def test_programs_that_are_no_studies(program, given, says, say):
    assert says in say(*given.split(), study=program)


def test_an_adapter_is_a_checkpoint(tmp_path):
    """Its model is found when it is loaded."""
    (tmp_path / "adapter_config.json").write_text("{}")
    cli.require_checkpoint("config.model", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="neither a folder with a checkpoint nor a hub id"):
        cli.require_checkpoint("config.model", "llava-1.5-7b")


def test_a_workdir_is_locked_while_its_holder_lives(tmp_path):
    """Also after SIGKILL nothing stale stays."""
    code = f"from experiments.running import lock; lock.acquire({str(tmp_path)!r}); print(1, flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    holder.stdout.readline()
    with pytest.raises(
        ValueError, match=rf"another run \(process {holder.pid} of .*choose another"
    ):
        lock.acquire(tmp_path)
    holder.kill()
    holder.wait()
    held = len(lock._held)
    lock.acquire(tmp_path)
    assert (tmp_path / lock.NAME).read_text().startswith(f"process {os.getpid()} ")
    with open(tmp_path / lock.NAME) as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    for handle in lock._held[held:]:
        os.close(handle)
    del lock._held[held:]


WAITS = """
import sys, threading
from experiments.running import interrupts
interrupts.watch()
if "save" in sys.argv:
    asked = threading.Event()
    interrupts.save_first(asked.set)
print(1, flush=True)
if "save" in sys.argv and "never" not in sys.argv:
    asked.wait()
    sys.exit(7)
held = threading.Lock()
held.acquire()
held.acquire()  # one instruction that does not end, as that of a compiler
"""


@pytest.mark.parametrize(
    ("how", "numbers", "status", "lines"),
    [
        ((), [signal.SIGINT], 130, ["stopped by Ctrl-C: finished work is saved; start again"]),
        ((), [signal.SIGTERM], 143, ["stopped by SIGTERM: finished work is saved; start again"]),
        (("save",), [signal.SIGINT], 7, []),
        (("save", "never"), [signal.SIGINT] * 2, 130, ["stopped by Ctrl-C: finished work"]),
    ],
)  # fmt: skip
def test_interrupts_are_one_line(how, numbers, status, lines):
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS, *how], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    process.stdout.readline()
    for number in numbers:
        time.sleep(0.2)
        process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == status
    assert len(said.splitlines()) == len(lines)
    assert all(line in said for line in lines)


@pytest.mark.parametrize(
    ("error", "before", "last"),
    [
        (ValueError("two\n  lines"), 0, "error: two lines"),
        (KeyError("no such field"), 0, "error: no such field"),
        (OSError(28, "No space left on device"), 0, "error: [Errno 28] No space left on device"),
        (ValueError("x" * 1000), 0, "error: " + "x" * 387 + "..."),
        (MemoryError(), 0, "error: MemoryError"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), 0, "error: RESOURCE_EXHAUSTED: Out of"),
        (TypeError("a bug"), 2, "error: TypeError: a bug (a bug in the program: please report it)"),
    ],
)  # fmt: skip
def test_an_error_of_a_study_ends_in_one_line(error, before, last):
    with pytest.raises(SystemExit) as end, cli.one_line(sys.exit):
        raise error
    *shown, line = end.value.code.splitlines()
    assert line.startswith(last) and len(shown) >= before and bool(shown) == bool(before)
