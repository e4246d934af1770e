"""The config of a published run, as a config file: interop/published/config.py:FILE.

`convert` uses it when --config is left out. It holds FILE's hyper-parameters under our names.
"""

import math
from typing import Any

from ml_collections import ConfigDict

from esolm_jax import config as config_lib
from esolm_jax.errors import UserError
from esolm_jax.interop.published import file as published_file
from esolm_jax.interop.published.file import find
from esolm_jax.interop.shown import is_scalar, shown

_FIELDS = {  # ours → the path in published hyper-parameters; used if it has the right type
    "seed": "seed",
    "data.seq_len": "model.length",
    "block_length": "block_size",
    "model.width": "model.hidden_size",
    "model.blocks": "model.n_blocks",
    "model.heads": "model.n_heads",
    "model.cond_width": "model.cond_dim",
    "model.dropout": "model.dropout",
    "optimizer.learning_rate": "optim.lr",
    "optimizer.b1": "optim.beta1",
    "optimizer.b2": "optim.beta2",
    "optimizer.eps": "optim.eps",
    "optimizer.weight_decay": "optim.weight_decay",
    "optimizer.clip_norm": "trainer.gradient_clip_val",
    "optimizer.warmup_steps": "lr_scheduler.num_warmup_steps",
    "optimizer.ema_decay": "training.ema",
    "train.batch_size": "loader.global_batch_size",
    "train.steps": "trainer.max_steps",
}
_HUB = {  # config.json of the models on the Hugging Face hub → names of the published runs
    "model_length": "length",
    "hidden_dim": "hidden_size",
    "hidden_size": "hidden_size",
    "cond_dim": "cond_dim",
    "n_blocks": "n_blocks",
    "n_heads": "n_heads",
    "dropout": "dropout",
}
_HIDDEN = ("objective", "alpha_0", "start_token", "model.heads")  # they do not follow from shapes
_NEEDED = ("data.seq_len", "model.")  # another type is an error
_TOKENIZERS = {"gpt2": "gpt2", "bert-base-uncased": "bert"}
_ESO = {  # by the mode of attention in each phase
    "algo.diffusion_attn_mode": {"causal": "eso_b", "mixed2": "eso_a"},
    "algo.sequential_attn_mode": {"causal": "eso_b", "mixed": "eso_a"},
}


def get_config(path: str) -> ConfigDict:
    """ConfigDict of the run that wrote FILE.

    Raises:
      UserError: FILE has no hyper-parameters, or their architecture is unsupported.
    """
    published = published_file.read(path)
    if published.ours is not None:
        return _own_config(published)
    if published.hyper is None:
        raise UserError(
            "--config is missing: the number of heads cannot be inferred from the tensors, and "
            f"{path} holds no hyper-parameters; give --config=configs/….py, such as "
            "--config=configs/owt.py:0.5"
        )
    return from_hyper(published.hyper, path)


def lacks_alpha_0(path: str) -> bool:
    """Whether FILE is an Eso-LM of the hub whose config.json does not say α₀."""
    hyper = _with_sections(published_file.read(path).hyper)
    return bool(find(hyper, "algo.of_hub")) and _objective(hyper, path)[1] is None


def _own_config(published: published_file.Published) -> ConfigDict:
    """The config in our own export, not yet validated. UserError: there is none."""
    try:
        return config_lib.from_saved(published.ours["config"], str(published.path))
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise UserError(f"{published.path}: damaged: its metadata hold no config") from error


def from_hyper(hyper: Any, where: str) -> ConfigDict:
    """Our config, from published hyper-parameters (see published_file.find)."""
    hyper = _with_sections(hyper)
    _check_architecture(hyper, where)
    config = config_lib.default_config()
    with config.unlocked():
        for name, path in _FIELDS.items():
            _take(config, name, find(hyper, path), f"{where}: {path}")
        config.objective, alpha_0 = _objective(hyper, where)
        config.alpha_0 = 1.0 if alpha_0 is None else alpha_0
        if config.objective == "ar":
            config.model.cond_width = 0
            token = _scalar(hyper, "algo.prepend_token", where)
            config.start_token = token if token in ("bos", "mask") else "none"
        block = find(hyper, "block_size")
        if config.objective == "bd3" and block is not None and block != config.block_length:
            raise UserError(f"{where}: block_size={shown(block)}: must be a positive integer")
        split = find(hyper, "algo.batch_split")
        config.kappa = float(split) if _is_number(split) and 0 < split < 1 else config.kappa
        loss = _scalar(hyper, "algo.loss_type", where)
        config.low_variance = loss == "low_var" and config.alpha_0 == 1
        _set_data(config, hyper, where)
    return config


def to_hyper(config) -> dict[str, Any]:
    """The inverse: published hyper-parameters that do not follow from the shapes of tensors."""
    name = {"ar": "ar", "mdlm": "mdlm", "bd3": "bd3lm"}.get(config.objective, "esolm")
    algo = {"name": name, "backbone": "esolm_dit" if name == "esolm" else "dit"}
    algo |= {"time_conditioning": False, "alpha_0": config.alpha_0, "batch_split": config.kappa}
    algo["causal_attention"] = name == "ar"
    for path, objectives in _ESO.items():
        modes = [mode for mode, objective in objectives.items() if objective == config.objective]
        algo |= dict.fromkeys([path.removeprefix("algo.")] * len(modes), *modes)
    if name == "ar":
        algo["prepend_token"] = config.start_token
    names = {ours: hub for hub, ours in _TOKENIZERS.items()}
    tokenizer = names.get(config.data.tokenizer, config.data.tokenizer)
    hyper = {"algo": algo, "model": {"type": "ddit"}, "data": {"tokenizer_name_or_path": tokenizer}}
    for ours, path in _FIELDS.items():
        *sections, field = path.split(".")
        node = hyper
        for section in sections:
            node = node.setdefault(section, {})
        node[field] = config_lib.flat(config)[ours]
    return hyper


def _with_sections(hyper: Any) -> Any:
    """Hyper-parameters as the published runs store them, from a checkpoint or a config.json of the
    hub."""
    if find(hyper, "config") is not None:
        hyper = find(hyper, "config")
    kind = find(hyper, "model_type")
    if kind is None:
        return hyper
    found = {name: find(hyper, hub) for hub, name in _HUB.items() if find(hyper, hub) is not None}
    algo = {name: find(hyper, name) for name in ("time_conditioning", "alpha_0", "causal", "adaln")}
    algo |= {"name": kind.lower() if isinstance(kind, str) else kind, "of_hub": True}
    if algo["name"] == "esolm":  # the hub's Eso-LM is (B)
        algo |= dict.fromkeys([path.removeprefix("algo.") for path in _ESO], "causal")
    data = {"tokenizer_name_or_path": "gpt2"}
    return {"algo": algo, "model": found, "data": data, "block_size": find(hyper, "block_size")}


def _scalar(hyper: Any, path: str, where: str) -> Any:
    """A number, a string or None. UserError: another value, such as an inert Object."""
    value = find(hyper, path)
    if not is_scalar(value):
        raise UserError(
            f"{where}: hyper-parameter {path} is {shown(value)}: must be a scalar; give --config"
        )
    return value


def _check_architecture(hyper: Any, where: str) -> None:
    allowed = {
        "algo.name": ("ar", "mdlm", "bd3lm", "esolm"),
        "algo.backbone": ("dit", "esolm_dit", "hf_dit"),
        "algo.time_conditioning": (False,),
        "algo.causal": (False,),
        "algo.adaln": (True,),
        "model.type": ("ddit",),
    }
    wrong = [
        f"{path}={shown(value)} (allowed: {', '.join(map(str, values))})"
        for path, values in allowed.items()
        if (value := _scalar(hyper, path, where)) is not None and value not in values
    ]
    if wrong:
        raise UserError(f"{where}: an unsupported architecture: {'; '.join(wrong)}")


def _is_number(value) -> bool:
    """Whether it is a number within the range of float()."""
    return type(value) is float or (type(value) is int and value.bit_length() < 64)


def _take(config: ConfigDict, name: str, value: Any, where: str) -> None:
    """Sets a field if the value is of its type and allowed; else the field keeps its value.
    UserError: the value is wrong and the model depends on it."""
    kind = type(config_lib.flat(config)[name])
    is_right = _is_number(value) and math.isfinite(value) and kind(value) == value
    if is_right and config_lib.is_allowed(name, kind(value)):
        config.update_from_flattened_dict({name: kind(value)})
    elif value is not None and name.startswith(_NEEDED):
        raise UserError(f"{where}={shown(value)}: must be a valid config.{name}")


def _objective(hyper: Any, where: str) -> tuple[str, float | None]:
    """objective and α₀; None: an Eso-LM of the hub, whose config.json does not say."""
    name = _scalar(hyper, "algo.name", where)
    fixed = {"ar": ("ar", 0.0), "mdlm": ("mdlm", 1.0), "bd3lm": ("bd3", 1.0)}
    if name in fixed:
        return fixed[name]
    if name is None:
        raise UserError(f"{where}: its hyper-parameters have no algo.name; give --config")
    alpha_0 = find(hyper, "algo.alpha_0")
    if alpha_0 is None and find(hyper, "algo.of_hub"):
        return "eso_b", None
    if not _is_number(alpha_0) or not 0 <= alpha_0 <= 1:
        raise UserError(f"{where}: its hyper-parameters have no algo.alpha_0; give --config")
    modes = {path: _scalar(hyper, path, where) for path in _ESO}
    # With alpha_0 = 0 or 1 there is one phase, and the mode of the other is unused.
    if alpha_0 == 0:
        del modes["algo.diffusion_attn_mode"]
    if alpha_0 == 1:
        del modes["algo.sequential_attn_mode"]
    objectives = {_ESO[path].get(mode) for path, mode in modes.items()}
    if len(objectives) > 1 or None in objectives:
        listed = ", ".join(f"{path}={shown(mode)}" for path, mode in modes.items())
        raise UserError(
            f"{where}: an unsupported architecture: {listed} (allowed: causal for Eso-LM (B); "
            "mixed2 in the diffusion phase and mixed in the sequential phase for (A))"
        )
    return objectives.pop(), float(alpha_0)


def _set_data(config: ConfigDict, hyper: Any, where: str) -> None:
    tokenizer = _scalar(hyper, "data.tokenizer_name_or_path", where)
    config.data.tokenizer = _TOKENIZERS.get(tokenizer, "gpt2")
    config.data.packing = "pad" if find(hyper, "data.wrap") is False else "wrap"
    config.data.source = "text"
    train = find(hyper, "data.train")
    is_lm1b = isinstance(train, str) and train.startswith("lm1b")
    if is_lm1b:
        config.data.source, config.data.train, config.data.test = "tfds:lm1b", "train", "test"
        config.data.detokenizer = "lm1b"
    if config.data.packing == "pad":
        config.data.document_end, config.data.window_specials = "none", "bos_eos"
    elif is_lm1b and config.data.tokenizer == "bert":
        config.data.document_end, config.data.window_specials = "bos", "bos_bos"


def check(config: ConfigDict, published: published_file.Published) -> None:
    """UserError if the file's hyper-parameters contradict `config` in something that does not
    follow from the shapes of tensors."""
    theirs: dict[str, Any] = {}
    if published.ours is not None:
        saved = config_lib.flat(_own_config(published))
        theirs = {name: saved.get(name) for name in _HIDDEN}
    elif published.hyper is not None:
        hyper, where = _with_sections(published.hyper), str(published.path)
        _check_architecture(hyper, where)
        theirs["model.heads"] = _scalar(hyper, "model.n_heads", where)
        if _scalar(hyper, "algo.name", where) is not None:
            theirs["objective"], theirs["alpha_0"] = _objective(hyper, where)
    ours = config_lib.flat(config)
    for name, value in theirs.items():
        if value is not None and ours[name] != value:
            raise UserError(
                f"config.{name}={ours[name]!r}: must be {shown(value)}, as in {published.path}"
            )
