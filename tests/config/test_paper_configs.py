"""The configs of the paper: every family and alpha_0, and windows as published."""

import json

import pytest
from config_files import ROOT
from golden_eval import FOLDER
from ml_collections import ConfigDict
from text_config import prepared_windows

from configs import lm1b_pad, lm1b_wrap, owt, owt_10k, text8
from esolm_jax import config as config_lib
from esolm_jax.data import build
from esolm_jax.data.manifest import planned_tokenizer
from esolm_jax.errors import UserError
from esolm_jax.evaluation import protocol

CONFIGS = {"owt": owt, "lm1b_wrap": lm1b_wrap, "lm1b_pad": lm1b_pad, "text8": text8}
FAMILIES = {
    "ar": ("ar", 0), "mdlm": ("mdlm", 1), "bd3": ("bd3", 1), "eso_a": ("eso_a", 0.5),
    "1": ("eso_b", 1), "0.5": ("eso_b", 0.5), "0.125": ("eso_b", 0.125), "0": ("eso_b", 0),
}  # fmt: skip
TEXTS = [f"Sentence {i} , which is n't short ; it has ( some ) marks ." for i in range(9)]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_alpha_0(name, family):
    config = CONFIGS[name].get_config(family)
    config_lib.validate(config)
    assert (config.objective, config.alpha_0) == FAMILIES[family]
    assert (config.model.width, config.model.blocks, config.train.batch_size) == (768, 12, 512)
    ids = planned_tokenizer(config)["vocab_size"]
    assert config.data.tokenizer_ids in (0, ids) and ids in (50257, 30522, 35)


def prepared(config: ConfigDict, path, tmp_path, tokenizer: str, **fields) -> list:
    """The windows of the test split of TEXTS, with a small tokenizer."""
    with config.unlocked():
        config.data.source, config.data.document = "text", "line"
        config.data.train = config.data.validation = config.data.files = ""
        config.data.test = str(path)
        config.data.tokenizer_path, config.data.tokenizer_ids = str(FOLDER / tokenizer), 0
        config.data.update(window_mode="published", **fields)
    config_lib.validate(config)
    manifest = build.prepare(config, tmp_path / "data", progress=False)
    return prepared_windows(manifest, "test")


@pytest.mark.parametrize(
    "module, tokenizer, settings",
    [
        (owt, "tokenizer_bpe", dict(dataset="openwebtext", insert_special_tokens=False)),
        (lm1b_wrap, "tokenizer_wordpiece", dict(dataset="lm1b")),
    ],
)
def test_windows_are_the_published_ones(tmp_path, module, tokenizer, settings):
    path = tmp_path / "a.txt"
    path.write_text("\n".join(TEXTS))
    windows = prepared(module.get_config("0.5"), path, tmp_path, tokenizer, seq_len=32)
    published = protocol.windows(
        TEXTS, FOLDER / tokenizer, insert_eos=True, block_size=32, **settings
    )
    assert windows == published.tolist() and len(windows) > 3


def test_padded_windows_are_the_published_ones(tmp_path):
    path, name = tmp_path / "a.txt", "tokenizer_wordpiece"
    path.write_text("\n".join(TEXTS))
    windows = prepared(lm1b_pad.get_config("0.5"), path, tmp_path, name, seq_len=24)
    settings = protocol.WindowSettings("lm1b", wrap=False, block_size=24)
    ids, mask = protocol.windows_with_mask(TEXTS, FOLDER / name, settings)
    rows = zip(ids, mask, strict=True)
    assert windows == [row[kept == 1].tolist() for row, kept in rows]


def test_text8_has_windows_of_256_characters(tmp_path):
    path = tmp_path / "text8"
    path.write_text("some characters of a long text " * 400)
    config = text8.get_config("mdlm")
    config.data.train = str(path)
    manifest = build.prepare(config, tmp_path / "data", progress=False)
    for split, entry in manifest.splits.items():
        assert entry["tokens"] == 256 * entry["windows"] > 0, split
    assert (
        manifest.load_tokenizer().decode(prepared_windows(manifest, "train")[0])
        == (path.read_text()[:256])
    )


def test_the_last_documents_of_owt_are_held_out(tmp_path):
    config = owt.get_config()
    assert (config.data.train, config.data.test) == ("train[:-100000]", "train[-100000:]")
    for missing, message in (("files", "data.files, which is ''"), ("tokenizer_path", "GPT|gpt2")):
        config = owt.get_config()
        config.data.files = str(tmp_path / "a.txt") if missing != "files" else ""
        (tmp_path / "a.txt").write_text("words\n" * 99)
        with pytest.raises(UserError, match=message):
            build.prepare(config, tmp_path / "data", progress=False)


def test_owt_10k_continues_a_run():
    workdir = ROOT / "tests" / "fixtures" / "workdir_947f88e" / "run"
    config = owt_10k.get_config(str(workdir))
    config_lib.validate(config)
    saved = config_lib.flat(config_lib.from_saved(json.loads(
        (workdir / "config.json").read_text())))  # fmt: skip
    new = config_lib.flat(config)
    assert new["data.seq_len"] == 10240 and new["init_from"] == str(workdir)
    same = [n for n, field in config_lib.fields().items() if field.fixes_weights]
    assert all(new[name] == saved[name] for name in [*same, "alpha_0", "data.tokenizer"])
    with pytest.raises(UserError, match="must name the workdir of an owt run"):
        owt_10k.get_config()
