"""The command line that all verbs share: --config=FILE --workdir=DIR --config.field=value …

Exit codes: 0 done; 2 bad input; 71 out of memory; 74 a file cannot be read or written; 130
interrupted; 143 terminated; 1 anything else. See failures.py.
"""

import contextlib
import dataclasses
import functools
import logging as logging_lib
import os
import pathlib
import re
import shlex
import sys
from collections.abc import Callable
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from esolm_jax import config as config_lib
from esolm_jax.errors import UserError
from esolm_jax.parallel import distributed, launcher, multihost, program_cache
from esolm_jax.parallel.guard import guard
from esolm_jax.process import failures, interrupts, jax_settings, standard_streams, startup
from esolm_jax.training import checkpoint_meta, checkpoint_steps

FlagValue = Callable[[str], str | None]  # the value of --name, before flags are parsed
_SAVED = pathlib.Path(__file__).with_name("saved_config.py")


def saved_config(workdir: str | pathlib.Path, step: str | None = None) -> str:
    """The value of --config that names the config of a checkpoint in a workdir, by default the
    latest. UserError: a bad step."""
    if step is None:
        return f"{_SAVED}:{workdir}"
    checkpoint_steps.check_selector(step, f"--step={step}")
    return f"{_SAVED}:{workdir}@{step}"


def define_step_flag() -> None:
    """Defines --step, for the verbs that read a checkpoint."""
    flags.DEFINE_string(
        "step", checkpoint_steps.LATEST, "Which checkpoint: a number, best or latest."
    )


def flag(name: str, default: Any) -> Any:
    """The value of a flag; `default` if the verb has no such flag or is called as a function."""
    return flags.FLAGS[name].value if name in flags.FLAGS else default


def step_flag() -> str:
    """The value of --step; "latest" if the verb has no such flag."""
    return flag("step", checkpoint_steps.LATEST)


def _flag_value(argv: list[str], name: str) -> str | None:
    """The last value of --name=value or --name value, before flags are parsed."""
    value = None
    for arg, following in zip(argv, [*argv[1:], None], strict=True):
        if match := re.fullmatch(rf"--?{name}(?:=(.*))?", arg):
            value = following if match[1] is None else match[1]
    return value


def _define_flags(argv: list[str], verb: str, needs_workdir: bool, find_config) -> None:
    workdir, config = _flag_value(argv, "workdir"), _flag_value(argv, "config")
    flags.DEFINE_string("workdir", None, "Folder of the run: data, checkpoints, results.")
    if any(re.match(r"--?help", arg) for arg in argv):
        return
    if needs_workdir and not workdir:
        raise UserError(f"--workdir is missing: python -m esolm_jax.{verb} --workdir=DIR …")
    if workdir and "://" in workdir:
        raise UserError(
            f"--workdir={workdir}: must be a folder, not a URL; mount the bucket (Cloud Storage "
            "FUSE) at the same path on all hosts, and give that path"
        )
    workdir = pathlib.Path(workdir or ".").expanduser()
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir}: must be a folder or a new path, not a file")
    default = find_config(workdir)
    if not config and default is None:
        raise UserError(f"--config is missing: python -m esolm_jax.{verb} --config=configs/….py …")
    if config and not pathlib.Path(config.split(":")[0]).is_file():
        raise UserError(f"--config={config}: no such file")
    config_flags.DEFINE_config_file("config", default, "The run's config file.", lock_config=True)


def command(verb: str, workdir: pathlib.Path, *flags_: str, keep: str = "") -> str:
    """A command line to run from the current folder.

    `keep`: a pattern; flags of this command with matching names are repeated, except those in
    `flags_`.
    """
    again = {"--workdir", *(flag.split("=")[0] for flag in flags_)}
    kept = [flag for flag in _given(keep) if flag.split("=")[0] not in again] if keep else []
    line = shlex.join([f"--workdir={workdir}", *kept, *flags_])
    return f"python -m esolm_jax.{verb} {line}"


def next_command(verb: str, workdir: pathlib.Path, *flags_: str, keep: str = "") -> str:
    """The line that a verb prints at its end; see `command`."""
    return f"next: {command(verb, workdir, *flags_, keep=keep)}"


CONFIG = r"config(\..+)?"  # --config and its overrides
CHECKPOINT_DATA_AND_DEVICES = r"step|config\.(mesh\..+|data\.dir)"


def mesh_flags(config, mesh, *, sampling: bool = False) -> list[str]:
    """Overrides with which one process can run the next verb: one device after a run of several
    processes (only their launcher can start those again); for sampling, whole texts on each device
    and a number of texts divisible by the devices."""
    m, changes = config.mesh, {}
    if distributed.process_count() > 1:
        default = config_lib.default_config().mesh
        changes = {name: default[name] for name in m if m[name] != default[name]} | {"devices": 1}
    elif sampling and mesh.shape["sequence"] > 1:
        changes = {"sequence": 1} | ({} if -1 in (m.fsdp, m.tensor) else {"data": -1})
    flags_ = [f"--config.mesh.{name}={value}" for name, value in changes.items()]
    if sampling and "devices" not in changes:
        shards = mesh.size // mesh.shape["tensor"]
        if config.sample.num_texts % shards:
            flags_.append(
                f"--config.sample.num_texts={shards * -(-config.sample.num_texts // shards)}"
            )
    return flags_


def _given(pattern: str) -> list[str]:
    """The flags of this command with matching names, each as --name=value or --noname."""
    words, left = [], list(sys.argv[1:])
    while left:
        word = left.pop(0)
        name, equals, _ = word.lstrip("-").partition("=")
        flag = flags.FLAGS[name] if name in flags.FLAGS else None
        if flag is not None and not equals and not flag.boolean and left:
            word += f"={left.pop(0)}"  # --name value
        name = name if flag is not None else name.removeprefix("no")
        if re.fullmatch(pattern, name):
            words.append("--" + word.lstrip("-"))
    return words


def join(config, *, stoppable: bool = False, uses_devices: bool = True) -> None:
    """Joins the other processes of the run, if any, and checks that config and code are the
    same, and that JAX uses the cluster's accelerators."""
    timeouts = config.distributed
    distributed.start(
        init_timeout=timeouts.init_timeout,
        heartbeat_timeout=timeouts.heartbeat_timeout,
        barrier_timeout=timeouts.barrier_timeout,
        stoppable=stoppable,
    )
    if uses_devices:
        distributed.check_accelerators()
    same = {"config": multihost.config_hash(config), "code version": multihost.code_hash()}
    multihost.check_same(same, timeout=timeouts.barrier_timeout)


@contextlib.contextmanager
def only_process_0_prints():
    """Standard output of other processes is dropped in this context."""
    if distributed.is_main():
        yield
    else:
        with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):
            yield


@dataclasses.dataclass(frozen=True)
class Verb:
    """How a verb runs.

    Attributes:
      reads_checkpoint: --config defaults to the config saved in the workdir; an error if it has no
        checkpoints. (Other verbs use the saved config if there is one.)
      one_process: main runs in process 0 only.
      others_wait: with `one_process`, further processes wait; else they are an error.
      stoppable: main uses stop_signal.StopSignal.
      leaves_at_once: main closes all files, and leaves no thread behind: startup.leave.
      needs_workdir: False: --workdir is optional and may be None.
      define_flags: defines the flags of this verb.
      default_config: from the values of flags to another default for --config, or None.
    """

    reads_checkpoint: bool = False
    one_process: bool = False
    others_wait: bool = False
    stoppable: bool = False
    leaves_at_once: bool = False
    needs_workdir: bool = True
    define_flags: Callable[[], None] = lambda: None
    default_config: Callable[[FlagValue], str | None] = lambda _: None


def _parse(verb: Verb, argv: list[str]) -> list[str]:
    """Defines and parses the flags. UserError: one of them is bad."""
    name = pathlib.Path(argv[0]).stem
    checkpoint_meta.begin_command()
    # absl and next_command read sys.argv again
    argv[:] = config_lib.with_current_overrides(argv)
    verb.define_flags()
    if verb.reads_checkpoint:
        define_step_flag()

    def find_config(workdir):
        flag = functools.partial(_flag_value, argv)
        has_checkpoints = verb.needs_workdir and (workdir / checkpoint_steps.FOLDER).is_dir()
        saved = verb.reads_checkpoint or (has_checkpoints and not flag("config"))
        given = verb.default_config(flag)
        return given or (saved_config(workdir, flag("step")) if saved else None)

    _define_flags(argv, name, verb.needs_workdir, find_config)
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        raise UserError(str(error)) from error
    except (AttributeError, ImportError, KeyError, SyntaxError, TypeError) as error:
        what = str(error).strip().splitlines()[0]
        file = _flag_value(argv, "config")
        raise UserError(f"--config={file}: {type(error).__name__}: {what}") from error
    if len(rest) > 1:
        raise UserError(f"{rest[1]!r}: must be a flag; write --name=value")
    return rest


def _run_main(main: Callable[[ConfigDict, pathlib.Path], None], verb: Verb) -> None:
    """Runs `main` in one or in all processes, with the config of the parsed flags."""
    config = flags.FLAGS.config
    config_lib.validate(config)
    several = launcher.launched() if verb.one_process else None
    if several and not verb.others_wait:
        name = pathlib.Path(sys.argv[0]).stem
        raise UserError(
            f"{name}: must run in one process, but {several} announces several; start it "
            "without the launcher"
        )
    with guard():
        if several or not verb.one_process:
            join(config, stoppable=verb.stoppable, uses_devices=not verb.one_process)
        program_cache.keep_compiled_programs()
        with only_process_0_prints():
            workdir = flags.FLAGS.workdir
            workdir = workdir and pathlib.Path(workdir).expanduser()
            if verb.one_process:
                multihost.on_main(lambda: main(config, workdir))
            else:
                main(config, workdir)
            if distributed.is_main() and (note := jax_settings.note()):
                print(note, file=sys.stderr)


def run(main: Callable[[ConfigDict, pathlib.Path], None], verb: Verb) -> None:
    """Runs `main(config, workdir)` with a validated config, then exits with a code of failures.py.
    A failure prints one line.

    With several processes, main runs in all of them and only process 0 prints.
    """
    _quiet_libraries()
    try:
        with jax_settings.pinned():
            app.run(lambda _: _run_main(main, verb), flags_parser=functools.partial(_parse, verb))
    except SystemExit as end:
        code = _checked(end.code)
    except BaseException as error:
        interrupts.finish()
        written = ((name, _flag_value(sys.argv, name)) for name in ("to", "workdir"))
        code = failures.report(error, next((f"--{n}={v}" for n, v in written if v), None))
    interrupts.finish()
    if verb.leaves_at_once:
        startup.leave(code)
    sys.exit(code)


def _quiet_libraries() -> None:
    """Hides the warnings of Orbax and Grain about their defaults, and their logs of exceptions that
    they also raise."""
    show_all = failures.wants_tracebacks()
    logging.set_verbosity(logging.ERROR if show_all else logging.FATAL)
    for name in () if show_all else ("asyncio", "concurrent.futures"):
        logging_lib.getLogger(name).setLevel(logging_lib.CRITICAL)


def _checked(code):
    """The exit code; in place of 0, the code of a failed thread or of failed standard output."""
    sys.stdout.flush()
    if code in (None, 0):
        for error in startup.thread_errors:  # already reported
            return failures.describe(error).code
        for error in standard_streams.failures:
            error.filename = "standard output"
            return failures.report(error)
    return code
