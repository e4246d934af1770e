"""Published checkpoints and pretrained models → a workdir; a workdir → safetensors.

python -m esolm_jax.convert --from=FILE --workdir=DIR --tokenizer=FILE_OR_FOLDER
python -m esolm_jax.convert --workdir=DIR --to=OUT.safetensors [--step=N|best|latest]

FOLDER: a GPT-2, Llama, Qwen, LLaDA, Dream or SDAR as on the Hugging Face hub. The written model
must be an "ar" model of style "llama".

python -m esolm_jax.convert --from=FOLDER --workdir=DIR
python -m esolm_jax.convert --workdir=DIR --to=FOLDER/

A folder of `export --to=hub` is read back bit for bit:

python -m esolm_jax.convert --from=FOLDER --workdir=DIR
"""

import pathlib
import shlex

from absl import flags

from esolm_jax import cli
from esolm_jax.errors import UserError
from esolm_jax.interop.hub import config as hub_config
from esolm_jax.interop.hub import from_esolm, from_hub, to_hub
from esolm_jax.interop.published import config as published_config
from esolm_jax.interop.published import file as published_file
from esolm_jax.interop.published import read as published_read
from esolm_jax.interop.published import write as published_write
from esolm_jax.training import checkpoint_steps


def define_flags() -> None:
    flags.DEFINE_string(
        "from",
        "",
        "A file of published weights (.ckpt, .pt, .bin, .safetensors), or the folder of a "
        "pretrained model.",
    )
    flags.DEFINE_string("to", "", "The .safetensors file to write, or a folder with a trailing /.")
    flags.DEFINE_string("tokenizer", "", "With --from: file or folder of the run's tokenizer.")
    flags.DEFINE_string("weights", "", "With --from: both | ema | raw; with --to: ema | raw.")
    cli.define_step_flag()


def default_config(flag: cli.FlagValue) -> str | None:
    """With --from, the config of the file's hyper-parameters; else the saved config."""
    _check_direction(flag("from"), flag("to"))
    if flag("config"):
        return None
    source = flag("from")
    if not source:
        return cli.saved_config(pathlib.Path(flag("workdir")).expanduser(), flag("step"))
    if from_esolm.is_folder(source):
        return f"{from_esolm.__file__}:{source}"
    source = published_file.in_folder(source)
    reader = hub_config if hub_config.is_folder(source) else published_config
    return f"{reader.__file__}:{source}"


def _check_direction(source: str | None, target: str | None) -> None:
    if bool(source) == bool(target):
        raise UserError(
            "give --from=FILE_OR_FOLDER (weights → --workdir) or --to=FILE_OR_FOLDER (--workdir → "
            f"safetensors){', not both' if source else ''}"
        )


def _weights(allowed: tuple[str, ...]) -> str:
    """--weights, by default the first of the allowed ones."""
    given = flags.FLAGS.weights or allowed[0]
    if given not in allowed:
        raise UserError(f"--weights={given}: must be one of {', '.join(allowed)}")
    return given


def main(config, workdir: pathlib.Path) -> None:
    source, target = flags.FLAGS["from"].value, flags.FLAGS.to
    _check_direction(source, target)
    if source and from_esolm.is_folder(source):
        _from_esolm(config, source, workdir)
        return
    source = published_file.in_folder(source) if source else source
    if source and hub_config.is_folder(source):
        _from_hub(config, source, workdir)
    elif source:
        _from_published(config, source, workdir)
    elif target.endswith("/") or pathlib.Path(target).expanduser().is_dir():
        _to_hub(config, workdir, pathlib.Path(target).expanduser())
    else:
        _to_published(config, workdir, pathlib.Path(target).expanduser())


def _from_published(config, source: str, workdir: pathlib.Path) -> None:
    weights = _weights(published_read.WEIGHTS)
    made = published_read.convert(config, source, workdir, flags.FLAGS.tokenizer, weights)
    print(
        f"{source}: {config.objective}, alpha_0 = {config.alpha_0}: {made.parameters:,} parameters "
        f"at step {made.step:,}"
    )
    if published_config.lacks_alpha_0(source):
        print(
            f"its config.json has no alpha_0: took {config.alpha_0:g}; to change it: "
            "--config.alpha_0=…"
        )
    print(
        f"converted {made.weights}; the optimizer state is new, so the learning rate warms up again"
    )
    step = f"{workdir}/{checkpoint_steps.FOLDER}/{made.step}"
    print(f"wrote {step}, {workdir}/tokenizer, and config.json")
    print(cli.next_command("sample", workdir))
    text = ["--config.data.source=text", "--config.data.train=FILES", "--config.data.test=FILES"]
    print("to evaluate it or to continue training, prepare text first (FILES: your files):")
    print(cli.command("prepare", workdir, *text))


def _check_no_weights_flag() -> None:
    if flags.FLAGS.weights:
        raise UserError(
            f"--weights={flags.FLAGS.weights}: must be left out, because a folder has one set of "
            "weights"
        )


def _from_esolm(config, source: str, workdir: pathlib.Path) -> None:
    _check_no_weights_flag()
    made = from_esolm.convert(config, source, workdir, flags.FLAGS.tokenizer)
    print(f"{source}: {config.objective}, {made.parameters:,} parameters: {made.weights}")
    print(f"wrote {workdir}/{checkpoint_steps.FOLDER}/0, {workdir}/tokenizer, and config.json")
    print(cli.next_command("sample", workdir))


def _from_hub(config, source: str, workdir: pathlib.Path) -> None:
    _check_no_weights_flag()
    made = from_hub.convert(config, source, workdir, flags.FLAGS.tokenizer)
    print(
        f"{source}: {config.objective}, {config.model.style}-style, {made.parameters:,} parameters "
        "with the mask token"
    )
    print(f"wrote {workdir}/{checkpoint_steps.FOLDER}/0, {workdir}/tokenizer, and config.json")
    print(cli.next_command("sample", workdir))
    print("to train it into an Eso-LM on your text (FILES), in a new folder (NEW):")
    file = pathlib.Path("configs/pretrained.py")
    file = file if file.is_file() else pathlib.Path(__file__).parents[1] / file
    recipe = [f"--config={file}:{workdir}", "--config.data.train=FILES"]
    print(cli.command("prepare", pathlib.Path("NEW"), *recipe))
    print(cli.command("train", pathlib.Path("NEW"), *recipe))


def _to_hub(config, workdir: pathlib.Path, target: pathlib.Path) -> None:
    _write(to_hub.convert, config, workdir, target)
    print(f"wrote {target}: config.json, the weights and the tokenizer")
    _print_inverse(f"--from={target}", "--workdir=NEW")


def _to_published(config, workdir: pathlib.Path, target: pathlib.Path) -> None:
    _write(published_write.convert, config, workdir, target)
    print(f"wrote {target}, under the published names")
    _print_inverse(f"--from={target}", "--workdir=NEW", f"--tokenizer={workdir}/tokenizer")


def _write(convert, config, workdir: pathlib.Path, target: pathlib.Path) -> None:
    weights = _weights(published_write.WEIGHTS)
    step, parameters = convert(config, workdir, target, weights, cli.step_flag())
    which = "the EMA" if weights == "ema" else "the raw weights"
    print(f"{workdir}: {which} at step {step:,}, {parameters:,} parameters")


def _print_inverse(*args: str) -> None:
    print(f"to convert it back: python -m esolm_jax.convert {shlex.join(args)}")


CLI = cli.Verb(one_process=True, define_flags=define_flags, default_config=default_config)

if __name__ == "__main__":
    cli.run(main, CLI)
