"""Sizes that no machine has are refused before anything is allocated, and none that would fit."""

import os
import resource

import jax
import pytest
import tiny_run
from tiny_run import FILE, arguments, command, make_config

from esolm_jax import memory_limit
from esolm_jax.data.manifest import planned_tokenizer
from esolm_jax.data.tokenizer import Bytes
from esolm_jax.errors import UserError
from esolm_jax.family.phase import SpecialIds
from esolm_jax.model import build
from esolm_jax.model import transformer as model_lib
from esolm_jax.parallel import sharding
from esolm_jax.sampling.generate import Generator
from esolm_jax.sampling.plan import schedule
from esolm_jax.sampling.plan.canvas import Canvas
from esolm_jax.training import checkpoint, restore

pytestmark = pytest.mark.fast_compile

TOKENIZER = {"vocab_size": 259, "mask_id": 259, "bos_id": 256}
HOST = 16e9


def mesh_of(config):
    return sharding.make_mesh(config.mesh)


def model_of(config, tokenizer=TOKENIZER):
    return build.model_config(config, tokenizer, "cpu")


def configured(**fields):
    return make_config({name.replace("__", "."): value for name, value in fields.items()})


@pytest.fixture
def host(monkeypatch):
    monkeypatch.setattr(memory_limit, "host_memory", lambda: (HOST, "this machine has"))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)


STYLES = [
    *(dict(style=style, cond_width=cond) for style in ("dit", "gpt2", "llama") for cond in (0, 8)),
    *(dict(style=style, qkv_bias=True, kv_heads=1) for style in ("dit", "llama")),
    *(dict(max_positions=20), dict(mlp_width=24), dict(attention_width=32), dict(qk_norm=True)),
    dict(blocks=3, width=24),
]


@pytest.mark.parametrize("fields", STYLES, ids=lambda fields: "-".join(map(str, fields.values())))
def test_number_of_parameters(fields):
    model = model_of(configured(**{f"model__{name}": value for name, value in fields.items()}))
    shapes = jax.eval_shape(lambda: model_lib.init(model, jax.random.key(0)))
    assert memory_limit.num_params(model) == sum(leaf.size for leaf in jax.tree.leaves(shapes))


TOO_MUCH = [  # fields, the one that is named, what is said
    ({"train__batch_size": 2**24}, "train.batch_size", "lower train.batch_size or data.seq_len"),
    ({"data__seq_len": 2**24}, "data.seq_len", "hidden states "),
    ({"data__seq_len": 2**24, "train__batch_size": 2**24}, "train.batch_size", "GB"),
    ({"model__width": 2**20}, "model.width", "Adam's moments and gradients"),
    ({"model__mlp_width": 2**20, "model__width": 2**16}, "model.width", "model.blocks"),
    ({"model__blocks": 1024, "model__width": 2**13}, "model.width", "model.blocks"),
    ({"eval__batch_size": 2**24, "model__width": 64}, "eval.batch_size", "lower eval.batch_size"),
    ({"data__workers": 256}, "data.workers", "worker processes 20.5"),
    ({"model__loss_chunk": 2**31 - 1, "train__batch_size": 2**20}, "model.loss_chunk", "logits "),
]


@pytest.mark.parametrize(("fields", "named", "said"), TOO_MUCH)
def test_training_that_cannot_fit_is_refused(host, fields, named, said):
    config = configured(**fields)
    with pytest.raises(UserError) as error:
        memory_limit.check_training(config, model_of(config), mesh_of(config))
    section, name = named.split(".")
    assert str(error.value).startswith(f"config.{named}={config[section][name]}: needs at least ")
    assert said in str(error.value) and "but this machine has 16.0 GB; lower" in str(error.value)


def test_more_workers_than_cores_can_serve_are_refused(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    config = configured(data__workers=32)
    memory_limit.check_training(config, model_of(config), mesh_of(config))
    config.data.workers = 33
    with pytest.raises(UserError, match="config.data.workers=33: must be at most 32 on 2 cores"):
        memory_limit.check_training(config, model_of(config), mesh_of(config))


def test_a_large_vocabulary_is_named(host):
    config = configured(model__width=2048)
    model = model_of(config, TOKENIZER | {"vocab_size": 2**22, "mask_id": 2**22})
    with pytest.raises(UserError, match="config.data.vocab_size=1024: needs at least"):
        memory_limit.check_training(config, model, mesh_of(config))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"eval__batch_size": 2**24}, "eval.batch_size"),
        ({"eval__num_orders": 10**6, "eval__batch_size": 2**13}, "eval.num_orders"),
        ({"model__width": 2**20}, "model.width"),
    ],
)
def test_evaluation_that_cannot_fit_is_refused(host, fields, named):
    config = configured(**fields)
    with pytest.raises(UserError, match=rf"^config\.{named}=\d+: needs at least [\d,.]+ GB"):
        memory_limit.check_evaluation(config, model_of(config), mesh_of(config))


@pytest.mark.parametrize(
    ("rows", "length", "named"),
    [
        (2**24, 16, "sample.num_texts"),
        (2, 2**24, "sample.length"),
        (2**24, 2**24, "sample.num_texts"),
    ],
)
@pytest.mark.parametrize("family", [
    {"objective": "ar"}, {"objective": "mdlm"}, {"objective": "bd3"}, {}, {"sample__steps": 9},
])  # fmt: skip
def test_sampling_that_cannot_fit_is_refused(monkeypatch, family, rows, length, named):
    monkeypatch.setattr(memory_limit, "host_memory", lambda: (4e8, "this machine has"))
    config = configured(**family)
    config.sample.num_texts, config.sample.length = rows, length
    with pytest.raises(UserError, match=rf"^config\.{named}=\d+: needs at least .* GB"):
        memory_limit.check_sampling(config, model_of(config), mesh_of(config), rows, length, False)


@pytest.mark.parametrize("path", ["2b", "7b", "owt", "medium", "lm1b_wrap", "text8", "shakespeare"])
def test_a_config_for_a_pod_fits_its_pod(monkeypatch, path):
    """16 GB a chip (7b.py: 95), as they were compiled for; on the laptop they do not fit."""
    from config_files import ROOT, load

    config = load(ROOT / "configs" / f"{path}.py")
    chips = 512 if path == "7b" else 1 if path == "shakespeare" else 256
    shape = {"data": chips // config.mesh.fsdp, "fsdp": config.mesh.fsdp, "tensor": 1}
    local = type("Local", (), {"size": min(chips, 4)})
    mesh = type("Mesh", (), {"shape": shape | {"sequence": 1}, "local_mesh": local, "size": chips})
    monkeypatch.setattr(sharding, "platform", lambda _: "tpu")
    chip = (95e9 if path == "7b" else 16e9, "a TPU has")
    monkeypatch.setattr(memory_limit, "device_memory", lambda _: chip)
    monkeypatch.setattr(memory_limit, "host_memory", lambda: (HOST, "this machine has"))
    model = model_of(config, planned_tokenizer(config))
    memory_limit.check_training(config, model, mesh)
    memory_limit.check_evaluation(config, model, mesh)
    memory_limit.check_sampling(config, model, mesh, 64, config.data.seq_len, False)
    if path == "7b":
        monkeypatch.setattr(memory_limit, "device_memory", lambda _: (2e9, "a TPU has"))
        with pytest.raises(UserError, match="needs at least .* but a TPU has 2.0 GB; lower"):
            memory_limit.check_training(config, model, mesh)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """(workdir with a tokenizer, fields of config.data)."""
    folder = tmp_path_factory.mktemp("sizes")
    fields = tiny_run.write_data(folder)
    (folder / "run" / "tokenizer").mkdir(parents=True)
    Bytes().save(folder / "run" / "tokenizer")
    return folder / "run", fields


def test_verbs_refuse_before_they_allocate(prepared, host, monkeypatch, capsys):
    """One line and exit code 2; no weights are read."""
    workdir, fields = prepared

    def refuse(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr(restore, "load_trained", refuse)
    monkeypatch.setattr(checkpoint, "Checkpoints", refuse)
    for verb, changes in [
        ("train", {"train.batch_size": 2**24, "data.workers": 2}),
        ("evaluate", {"eval.batch_size": 2**24}),
        ("sample", {"sample.num_texts": 2**20, "sample.length": 2**12}),
        ("sample", {"sample.length": 2**24, "sample.num_texts": 2**8}),
    ]:
        capsys.readouterr()
        given = arguments(fields | changes)
        code = command(verb, f"--config={FILE}", f"--workdir={workdir}", *given)
        error = capsys.readouterr().err.splitlines()
        assert code == 2 and len(error) == 1, error
        assert error[0].startswith(f"error: config.{next(iter(changes))}="), error
        assert "needs at least" in error[0] and "but this machine has 16.0 GB" in error[0]


def test_limit_of_the_address_space_is_known(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (3 * 10**9, -1))
    assert memory_limit.host_memory() == (3 * 10**9, "ulimit -v leaves this process")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, -1))
    have, name = memory_limit.host_memory()
    assert 10**8 < have < 10**15 and name.endswith("has")


@pytest.mark.parametrize(
    ("line", "file"),
    [
        ("0::/jobs/a", "jobs/memory.max"),
        ("4:cpu,memory:/jobs/a", "memory/jobs/memory.limit_in_bytes"),
        ("0::/not/there", "memory.max"),
    ],
)
def test_limit_of_the_control_group_is_known(tmp_path, monkeypatch, line, file):
    monkeypatch.setattr(memory_limit, "_meminfo", lambda _: -1)
    of = tmp_path / "cgroup"
    of.write_text(f"3:pids:/x\n{line}\n")
    assert memory_limit._control_group(str(tmp_path), str(of)) == -1
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("max\n")
    assert memory_limit._control_group(str(tmp_path), str(of)) == -1
    path.write_text("5000\n")
    assert memory_limit._control_group(str(tmp_path), str(of)) == 5000


def test_estimates_of_sampling_are_below_what_is_allocated():
    """The tables and the canvas that the sampler makes take at least what is estimated."""
    config = configured(sample__num_texts=4)
    canvas = Canvas.empty(4, 16)
    passes = Generator.of(config, canvas, SpecialIds(mask=259, start=256)).plan
    arrays = [canvas.token, canvas.known, passes.order, passes.known]
    assert sum(a.nbytes for a in arrays) >= (memory_limit.CANVAS_BYTES - 1) * 64
    names = "start first size end bidirectional_below leftmost_unknown".split()
    tables = sum(getattr(passes, name).nbytes for name in names) + passes.size.nbytes
    assert tables >= memory_limit.TABLE_BYTES * 64


def test_a_million_steps_are_drawn_once_for_all_rows(monkeypatch):
    """Rows alike share their step sizes; a row of 16 tokens is done after a few draws."""
    drawn, draw = [], schedule.ancestral_sizes

    def count(*args):
        drawn.append(args)
        return draw(*args)

    monkeypatch.setattr(schedule, "ancestral_sizes", count)
    rows = schedule.ancestral(Canvas.empty(64, 16, seed=123), 0.5, 1000)
    assert len(drawn) == 1
    assert (rows.sizes == rows.sizes[:, :1]).all() and (rows.sizes.sum(axis=0) == 16).all()
