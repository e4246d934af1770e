"""python -m esolm_jax.verify --workdir=DIR: checks every file of a workdir for damage.

Checks each checkpoint, the prepared data (every record), the tokenizer, config.json and
metrics.jsonl, prints a table, and ends with code 2 if anything is damaged.
`python -m esolm_jax.evaluate --workdir=DIR --verify` does the same.
"""

import dataclasses
import pathlib
from collections.abc import Iterator

from esolm_jax import cli
from esolm_jax import config as config_lib
from esolm_jax.data import integrity
from esolm_jax.data.manifest import load_manifest, open_tokenizer
from esolm_jax.errors import UserError
from esolm_jax.files import regular_file
from esolm_jax.training import checkpoint_digests, checkpoint_meta, checkpoint_steps, metrics_file
from esolm_jax.training import metrics as metrics_lib
from esolm_jax.training.checkpoint_digests import Damaged

_MAX_CONFIG = 2**24  # bytes
INTACT, DAMAGED, UNKNOWN = "intact", "DAMAGED", "unknown"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One row of the table: a part of the workdir, its state and the reason."""

    part: str
    state: str
    why: str


def get_config():
    """The defaults: the config is unused, and the config of the workdir may be damaged."""
    return config_lib.default_config()


def verify(workdir: pathlib.Path) -> Iterator[Finding]:
    """A finding for each part of the workdir. UserError if there is no such folder."""
    if not workdir.is_dir():
        raise UserError(f"--workdir={workdir}: no such folder")
    meta = None
    for step in reversed(checkpoint_steps.steps_in(workdir)):
        finding, meta_here = _step(workdir, step)
        meta = meta or meta_here
        yield finding
    yield from _config(workdir, meta)
    if (workdir / metrics_lib.FILE).exists():
        yield _metrics(workdir, meta)
    if meta is not None or (workdir / "tokenizer").exists():
        yield _tokenizer(workdir, meta)
    folder = _data_dir(workdir, meta)
    if folder.exists() or meta is not None:
        yield from _data(folder, needed=not (meta or {}).get("converted"))


def _step(workdir: pathlib.Path, step: int) -> tuple[Finding, dict | None]:
    """The finding of a checkpoint, and its meta if that can be read."""
    folder = checkpoint_steps.step_folder(workdir, step)
    part, meta = f"{checkpoint_steps.FOLDER}/{step}", None
    try:
        meta = checkpoint_steps.read_meta_file(folder)
        items = ["meta", *checkpoint_meta.items_of(meta)]
        entry = checkpoint_digests.read(folder)
        if entry is not None:
            items = sorted({name.split("/")[0] for name in entry["files"]} | set(items))
        if line := checkpoint_digests.problem(folder, items):
            raise Damaged(line)
    except Damaged as error:
        return Finding(part, DAMAGED, str(error)), meta
    if entry is None:
        return Finding(part, UNKNOWN, "written without digests"), meta
    size = sum(size for size, _ in entry["files"].values())
    why = f"{len(entry['files'])} files, {size / 1e6:,.1f} MB, digest {entry['digest'][:12]}"
    return Finding(part, INTACT, why), meta


def _config(workdir: pathlib.Path, meta: dict | None) -> Iterator[Finding]:
    path = workdir / "config.json"
    if not path.exists():
        return
    try:
        config = config_lib.from_saved(regular_file.read_json(path, _MAX_CONFIG), str(path))
        config_lib.validate(config)
        now = config_lib.flat(config)
        saved = config_lib.flat(checkpoint_meta.config_in(meta, workdir)) if meta else now
    except UserError as error:
        yield Finding(path.name, DAMAGED, str(error))
    except Exception as error:  # ConfigDict raises many types
        yield Finding(path.name, DAMAGED, f"{path}: not a config ({type(error).__name__})")
    else:
        other = [name for name in now if saved[name] != now[name]]
        why = f"config.{other[0]} differs from the newest checkpoint's" if other else "valid"
        yield Finding(path.name, UNKNOWN if other else INTACT, why)


def _metrics(workdir: pathlib.Path, meta: dict | None) -> Finding:
    path = workdir / metrics_lib.FILE
    try:
        content = metrics_file.read(path)
    except UserError as error:
        return Finding(path.name, DAMAGED, str(error))
    expected = (meta or {}).get("metrics_entries", 0)
    if content.damaged:
        lines = ", ".join(map(str, content.damaged[:5]))
        return Finding(path.name, DAMAGED, f"{path}: damaged lines: {lines}")
    if len(content.entries) < expected:
        return Finding(
            path.name, DAMAGED, f"{path}: {len(content.entries)} entries, not {expected}"
        )
    return Finding(path.name, INTACT, f"{len(content.entries)} entries")


def _tokenizer(workdir: pathlib.Path, meta: dict | None) -> Finding:
    folder = workdir / "tokenizer"
    try:
        tokenizer = open_tokenizer(folder)
    except UserError as error:
        return Finding(folder.name, DAMAGED, str(error))
    if meta is None:
        return Finding(folder.name, UNKNOWN, "no checkpoint to compare it with")
    if tokenizer.fingerprint != meta["tokenizer"]["fingerprint"]:
        why = f"{folder}: not the tokenizer that the checkpoint was trained on"
        return Finding(folder.name, DAMAGED, why)
    return Finding(folder.name, INTACT, f"{tokenizer.kind} of {tokenizer.vocab_size} tokens")


def _data_dir(workdir: pathlib.Path, meta: dict | None) -> pathlib.Path:
    named = meta["config"].get("data", {}).get("dir") if meta else ""
    return pathlib.Path(named).expanduser() if named else workdir / "data"


def _data(folder: pathlib.Path, *, needed: bool) -> Iterator[Finding]:
    if not folder.exists() and not needed:
        return
    try:
        manifest = load_manifest(folder)
    except UserError as error:
        yield Finding("data", DAMAGED, str(error))
        return
    kept = "digests" if manifest.files else "no digests, consistent"
    yield Finding("data", INTACT, f"{folder}: manifest, tokenizer and counts ({kept})")
    for split, entry in manifest.splits.items():
        problems = list(integrity.record_problems(manifest, [split]))
        why = problems[0] if problems else f"{entry['windows']:,} windows"
        yield Finding(f"data, {split}", DAMAGED if problems else INTACT, why)


def main(config, workdir: pathlib.Path) -> None:
    del config
    damaged = count = 0
    for finding in verify(workdir):
        print(f"{finding.part:<20} {finding.state:<8} {finding.why}", flush=True)
        count += 1
        damaged += finding.state == DAMAGED
    if not count:
        raise UserError(f"--workdir={workdir}: holds nothing to verify")
    if damaged:
        raise UserError(f"--workdir={workdir}: {damaged} of {count} parts are damaged")
    print("nothing is damaged")


CLI = cli.Verb(one_process=True, default_config=lambda _: __file__)

if __name__ == "__main__":
    cli.run(main, CLI)
