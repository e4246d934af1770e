"""`compile`: what a training step costs on a pod, held to its limits; needs the compilers."""

import json

import jax
import pytest
import tiny_run
from thorough import thorough

from esolm_jax import compile as compile_lib
from esolm_jax import config as config_lib
from esolm_jax.aot import topology
from esolm_jax.aot.hlo_parse import parse
from esolm_jax.errors import UserError

POD = "v5e:4x4"


def make_config(**fields):
    """Large enough that what grows with the model outweighs what does not."""
    config = config_lib.default_config()
    config.data.seq_len = 256
    config.data.vocab_size = 8191
    config.model.width = 512
    config.model.blocks = 2
    config.model.heads = 4
    config.model.dropout = 0.0
    config.model.dtype = "bfloat16"
    config.model.loss_chunk = 128
    config.mesh.fsdp = 4
    config.train.batch_size = 64
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    config_lib.validate(config)
    return config


ESO_B, MDLM = {"objective": "eso_b"}, {"objective": "mdlm", "alpha_0": 1.0}
STEPS = {
    "h100:8, eso_b": ("h100:8", ESO_B | {"model__remat": "operands"}),  # its usual pass is unrolled
    "h100:8, mdlm, cudnn": ("h100:8", MDLM | {"model__attention": "cudnn"}),
    "v5e:4x4, mdlm": (POD, MDLM),
    "v5e:4x4, eso_b": (POD, ESO_B),  # its two phases, trimmed or not, take over a minute
}


@pytest.fixture(
    scope="module",
    params=[pytest.param(n, marks=[thorough] * (n == "v5e:4x4, eso_b")) for n in STEPS],
)
def step(request):
    name, fields = STEPS[request.param]
    pytest.importorskip("jax_cuda12_plugin" if name == "h100:8" else "libtpu")
    if "cudnn" in request.param:
        pytest.importorskip("nvidia.cudnn")
    return compile_lib.measure(make_config(**fields), name)


def test_flops_are_close_to_the_lower_bound(step):
    flops = step["flops"]
    assert flops["uncounted_kernels"] == []
    assert set(flops["lower_bound_by_kind"]) <= set(flops["by_kind"])
    # Short texts: attention kernels compute blocks of 128 where half of the pairs are visible.
    for kind, limit in {"blocks": 1.08, "head": 1.15}.items():
        assert 1.0 <= flops["by_kind"][kind] / flops["lower_bound_by_kind"][kind] < limit
    assert flops["ratio"] < 1.2


def test_collectives_are_the_ideal_ones_of_the_sharding(step):
    sent = step["collectives"]
    assert sent["stray_gathers"] == []
    assert 0.95 < sent["ratio"] < 1.15
    for kind in ("all-gather", "reduce-scatter"):
        assert 0.95 < sent["sent"][kind] / sent["ideal"][kind] < 1.15


def test_a_step_on_a_gpu_has_no_stacks_and_no_passes_over_parameters_but_one():
    """The only loop is that over chunks of the head, and what is larger than a chunk's logits or
    an activation is read and written as often as AdamW and EMA need it."""
    pytest.importorskip("jax_cuda12_plugin")
    config = make_config(objective="mdlm", alpha_0=1.0, model__remat="matmuls", mesh__fsdp=1)
    training = compile_lib.make_training(config, "h100:1")
    module = parse(compile_lib.compile_step(training).as_text())
    every = [i for c in module.computations.values() for i in c.instructions.values()]
    assert {"predicted_chunks" in i.op_name for i in every if i.opcode == "while"} == {True}
    update = [i for i in module.entry.instructions.values() if i.opcode == "fusion"]
    table = (8192, 512)  # of the embedding
    written = [i for i in update if [s.sizes for s in i.shapes].count(table) == 4]
    assert len(written) == 1  # the weights, both moments and the EMA, in one kernel


def test_memory_is_that_of_a_part_of_the_state(step):
    hbm = step["hbm"]
    split = step["parameters"] * 4 / 4  # float32, over fsdp = 4
    assert split < hbm["parameters"] < 1.05 * split
    assert hbm["ema"] == hbm["parameters"]
    assert 2 * hbm["parameters"] <= hbm["optimizer"] < 2.01 * hbm["parameters"]
    assert hbm["activations"] > 0 and hbm["temporaries"] > 0
    assert hbm["fits"] and hbm["total"] < hbm["available"]


def test_what_does_not_fit_is_told(capsys):
    pytest.importorskip("libtpu")
    tall = {"data__vocab_size": 2**21 - 1, "model__width": 2048, "model__blocks": 1}
    config = make_config(objective="ar", alpha_0=0.0, model__cond_width=0, **tall)
    figures = compile_lib.measure(config, POD)
    assert not figures["hbm"]["fits"] and "exceeds" in figures["hbm"]["message"]
    compile_lib.show(figures)
    assert "does not fit" in capsys.readouterr().out


def test_unknown_pod_lists_the_known():
    with pytest.raises(UserError) as error:
        topology.parse("v5e:16x17")
    message = str(error.value)
    assert message.startswith("--topology=v5e:16x17: must be one of")
    assert "v5e:16x16" in message and "v5p" in message


def test_mesh_that_does_not_multiply_to_the_chips():
    pytest.importorskip("libtpu")
    with pytest.raises(UserError, match=r"config\.mesh .*16"):
        compile_lib.make_training(make_config(mesh__data=3), POD)


def test_dimension_that_does_not_divide():
    pytest.importorskip("libtpu")
    with pytest.raises(UserError, match=r"config\.model\.heads=4: .*config\.mesh\.tensor=8"):
        compile_lib.make_training(make_config(mesh__fsdp=1, mesh__tensor=8), POD)


@pytest.mark.parametrize("program", ["evaluate", "sample"])
def test_command_of_another_program(program, tmp_path, capsys, monkeypatch):
    pytest.importorskip("libtpu")
    monkeypatch.chdir(tmp_path)
    fields = {"mesh.devices": 0, "mesh.fsdp": 2, "sample.num_texts": 16}
    fields |= {"train.batch_size": 32, "eval.batch_size": 16}
    arguments = tiny_run.arguments(fields)
    command = [f"--config={tiny_run.FILE}", "--topology=v5e:4x4", f"--program={program}"]
    assert tiny_run.command("compile", *command, *arguments) == 0
    figures = json.loads((tmp_path / "compile.json").read_text())
    assert figures["hbm"]["fits"] and figures["flops"] > 0
    assert capsys.readouterr().out.startswith(f"{program}: ")
    assert jax.default_backend() == "cpu"
