"""LLaDA, Dream and SDAR folders → workdirs: the logits and tokens of the public code, by labels."""

import json
import shutil

import golden_models
import numpy as np
import pytest
from golden_models import NAMES, case, convert, model, read_json, read_npz
from thorough import thorough
from tiny_run import command

import esolm_jax
from esolm_jax.data.manifest import open_tokenizer

LATE = 10**6  # a rank after all real ones
WHOLE = NAMES[:4]  # the models that read the whole text
# Every length compiles a program, so the other lengths run only on demand.
PLAIN = [
    *((n, k) for n in WHOLE for k in ("plain", "masked")),
    *(("sdar", k) for k in ("block_causal_plain", "block_causal_last_block_masked")),
    *(
        pytest.param(n, k, marks=thorough)
        for n in WHOLE
        for k in ("prompt_then_masks", "all_masks")
    ),
]


def close(logits, wanted):
    np.testing.assert_allclose(np.asarray(logits), wanted, rtol=0, atol=2e-5)


def labelled(name, golden, rank, in_context):
    """Logits of the case's tokens by these labels; its own positions, or 0, 1, 2, …"""
    ids = golden["input_ids"]
    position = golden.get("position_ids", np.arange(ids.shape[1])[None])
    labels = (np.broadcast_to(a, ids.shape) for a in (position, rank, in_context))
    return np.asarray(model(name).logits(ids, *labels))


@pytest.mark.parametrize(("name", "key"), PLAIN)
def test_logits_of_ids(name, key):
    golden = case(name, "logits", key)
    close(model(name).logits(golden["input_ids"]), golden["logits"])


@pytest.mark.parametrize(
    ("name", "key"),
    [
        *(("llada_mha", k) for k in ("left_padded", "right_padded_masked")),
        *(("dream", k) for k in ("left_padded_mask_2d", "left_padded_mask_2d_positions")),
        *(
            pytest.param("llada_gqa_tied", k, marks=thorough)
            for k in ("left_padded", "right_padded_masked")
        ),
        *(
            pytest.param("dream_tied_bf16", k, marks=thorough)
            for k in ("left_padded_mask_2d", "left_padded_mask_2d_positions")
        ),
    ],
)
def test_padding_has_a_later_rank(name, key):
    golden = case(name, "logits", key)
    is_real = golden["attention_mask"] == 1
    logits = labelled(name, golden, np.where(is_real, 0, LATE), True)
    close(logits[is_real], golden["logits"][is_real])


@pytest.mark.parametrize(
    ("name", "key", "mask"),
    [
        ("llada_mha", "attention_bias_two_documents", "attention_bias"),
        *(
            pytest.param(*case, marks=thorough)
            for case in (
                ("llada_gqa_tied", "attention_bias_two_documents", "attention_bias"),
                ("dream", "mask_4d_two_documents", "attention_mask"),
                ("dream_tied_bf16", "mask_4d_two_documents", "attention_mask"),
            )
        ),
    ],
)
def test_two_documents_are_two_ranks_of_query_copies(name, key, mask):
    golden = case(name, "logits", key)
    allowed = golden[mask][0, 0]
    rank = np.unique(allowed, axis=0, return_inverse=True)[1].reshape(1, -1)
    np.testing.assert_array_equal(rank.T == rank, allowed)
    close(labelled(name, golden, rank, False), golden["logits"])


@thorough
def test_bidirectional_mask_of_sdar():
    golden = case("sdar", "logits", "bidirectional")
    close(labelled("sdar", golden, 0, True), golden["logits"])


def test_training_layout_of_sdar():
    golden = case("sdar", "logits", "training_layout_noisy_then_clean")
    block = golden["position_ids"] // 4
    in_context = np.arange(block.shape[1]) >= block.shape[1] // 2
    close(labelled("sdar", golden, block, in_context), golden["logits"])


@pytest.mark.parametrize(
    "variant",
    [
        "scale_logits",
        "input_emb_norm",
        *(pytest.param(v, marks=thorough) for v in ("rope_theta_10000", "rms_norm_eps_0.1")),
    ],
)
def test_options_of_llada(variant, tmp_path):
    folder = shutil.copytree(golden_models.FOLDER / "llada_mha", tmp_path / "folder")
    edit(folder, read_json("llada_mha")["config_variants"][variant])
    assert convert(folder, tmp_path / "run") == 0
    golden = case("llada_mha", "logits", f"variant_{variant}")
    close(esolm_jax.load(tmp_path / "run").logits(golden["input_ids"]), golden["logits"])


def edit(folder, changes):
    """Changes fields of config.json; None removes one."""
    fields = json.loads((folder / "config.json").read_text()) | changes
    fields = {name: value for name, value in fields.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(fields))


@pytest.mark.parametrize("name", NAMES)
def test_tokenizer(name):
    """Of Dream also from vocab.json and merges.txt alone, as its folder has them."""
    tokenizer = open_tokenizer(golden_models.workdir(name) / "tokenizer")
    golden = read_json(name, "tokenizer_cases")
    for one in [*golden["encode"], golden["chat"]]:
        assert tokenizer.recognizing().encode(one["text"]).ids == one["ids"], one["text"]
        if "<|" not in one["text"]:  # ours spells the names of special tokens
            assert tokenizer.encode(one["text"]) == one["ids"], one["text"]
    assert tokenizer.mask_id == golden["mask_id"] == read_json(name, "config")["mask_token_id"]
    assert tokenizer.vocab_size == read_npz(name, "logits")[f"{first_case(name)}.logits"].shape[-1]
    assert tokenizer.decode([tokenizer.mask_id]) == "[MASK]"
    assert tokenizer.decode([tokenizer.vocab_size - 1]) == ""  # padding of the vocabulary


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("llada_mha", {"block_type": "sequential"}, "block_type='sequential' (allowed: 'llama')"),
        ("llada_mha", {"block_type": None}, "block_type='sequential'"),  # LLaDA's default
        ("llada_mha", {"activation_type": "swiglu"}, "activation_type='swiglu'"),
        ("llada_mha", {"alibi": True, "block_group_size": 2}, "alibi=True"),
        ("llada_gqa_tied", {"weight_tying": False}, "missing tensors: model.transformer.ff_out"),
        ("llada_mha", {"mask_token_id": 384}, "mask_token_id=384: must be a token id below 384"),
        ("llada_mha", {"quantization_config": {}}, "quantization_config"),
        ("dream", {"use_sliding_window": True}, "use_sliding_window=True"),
        ("sdar", {"model_type": "sdar_moe"}, "model_type='sdar_moe': an unsupported architecture"),
        ("sdar", {"block_size": 0}, "block_size=0: must be a positive int"),
    ],
)
def test_folders_that_are_refused(name, changes, words, tmp_path, capsys):
    folder = shutil.copytree(golden_models.FOLDER / name, tmp_path / "folder")
    edit(folder, changes)
    assert convert(folder, tmp_path / "run") == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_missing_shard(tmp_path, capsys):
    folder = shutil.copytree(golden_models.FOLDER / "dream", tmp_path / "folder")
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert convert(folder, tmp_path / "run") == 2
    assert "shards are missing: model-00002" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mask", "id", "words"),
    [
        (True, 319, "mask token: id 319, by its name"),
        (False, 336, "WARNING: mask token: id 336, a new one"),
    ],
)
def test_without_a_mask_id(mask, id, words, tmp_path, capsys):
    folder = shutil.copytree(golden_models.FOLDER / "dream", tmp_path / "folder")
    edit(folder, {"mask_token_id": None})
    if not mask:
        added = json.loads((folder / "added_tokens.json").read_text())
        added.pop("<|mask|>")
        (folder / "added_tokens.json").write_text(json.dumps(added))
    assert convert(folder, tmp_path / "run") == 0
    assert words in capsys.readouterr().out
    assert open_tokenizer(tmp_path / "run" / "tokenizer").mask_id == id


def first_case(name):
    return "bidirectional" if name == "sdar" else "plain"


@pytest.mark.parametrize("to", ["hub", "folder"])
def test_dream_is_not_exported(to, tmp_path, capsys):
    target = to if to == "hub" else tmp_path / to
    workdir = golden_models.workdir("dream")
    assert command("export", f"--workdir={workdir}", f"--to={target}") == 2
    assert "config.objective='mdlm_shifted': cannot be exported" in capsys.readouterr().err
