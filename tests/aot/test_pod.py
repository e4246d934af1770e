"""What a step cannot do without, against counting; which pods are known."""

import dataclasses
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from esolm_jax.aot import chips, hlo, lower_bound, topology
from esolm_jax.config import default_config
from esolm_jax.errors import UserError
from esolm_jax.family.family import Work
from esolm_jax.family.labels import LabelledBatch, Layout, Tokens
from esolm_jax.family.phase import make_phases
from esolm_jax.family.rule import dense_mask
from esolm_jax.model import transformer as model
from esolm_jax.model.lm_head import Head
from esolm_jax.model.model_config import ModelConfig
from esolm_jax.parallel import sharding
from esolm_jax.training.phase_loss import PhaseLoss

pytestmark = pytest.mark.fast_compile

LENGTH, ROWS, BLOCK = 12, 1024, 4
CASES = [
    ("ar", 0.0),
    ("mdlm", 1.0),
    ("bd3", 1.0),
    ("eso_a", 0.75),
    ("eso_b", 0.25),
]


def config_of(objective, alpha_0, rows=ROWS):
    config = toy.config(objective, alpha_0, LENGTH, BLOCK)
    config.train.batch_size = rows
    return config


def counted(labelled, two_streams_needed: bool) -> Work:
    """Of the tokens that a loss or another such token needs, a row on average."""
    is_predicted = np.pad(np.asarray(labelled.weight) != 0, ((0, 0), (0, LENGTH)))
    tokens = labelled.tokens
    is_predicted = is_predicted[:, : tokens.token.shape[1]]
    needed = np.asarray(tokens.in_context) | is_predicted | two_streams_needed
    pairs = np.asarray(dense_mask(tokens, tokens)) & needed[:, :, None] & needed[:, None]
    return Work(*(a.sum() / len(a) for a in (needed, is_predicted, pairs)))


@pytest.mark.parametrize(("objective", "alpha_0"), CASES)
def test_tokens_and_pairs_of_a_row_are_those_counted(objective, alpha_0):
    """Within 1.5 %, since what is drawn is random."""
    config = config_of(objective, alpha_0)
    x = np.zeros((ROWS, LENGTH), np.int32)
    for phase in make_phases(config, toy.SPECIAL, low_variance=False):
        labelled = jax.jit(phase.label)(jax.random.key(0), x, x == 0)
        # In a block of BD3-LM the clean copies are read by the masked ones.
        wanted = counted(labelled, objective == "bd3")
        found = lower_bound.row(config, phase)
        for a, b in zip(*map(dataclasses.astuple, (found, wanted)), strict=True):
            assert abs(a - b) <= 0.015 * b


def test_a_step_is_all_rows_of_all_phases():
    config = config_of("eso_b", 0.5, rows=8)
    config.kappa = 0.25
    first, second = phases = make_phases(config, toy.SPECIAL, low_variance=False)
    a, b = (dataclasses.astuple(lower_bound.row(config, phase)) for phase in (first, second))
    found = dataclasses.astuple(lower_bound.step(config, phases))
    np.testing.assert_allclose(found, 2 * np.array(a) + 6 * np.array(b))


# A compiled step.

SIZES = dict(vocab_size=40, width=16, blocks=2, heads=4, cond_width=0, attention="dense")
DIT = ModelConfig(**SIZES)
LLAMA = ModelConfig(**SIZES, style="llama", kv_heads=2, mlp_width=24)


def labelled_shapes(rows, length, mesh=None):
    """Two streams of which all query copies predict."""
    where = None if mesh is None else sharding.rows(mesh)

    def of(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=where)

    text = of(2 * length)
    tokens = Tokens(text, text, text, of(2 * length, dtype=jnp.bool_), Layout(length, length))
    return LabelledBatch(tokens, of(length), of(length, dtype=jnp.float32), of())


def compiled(config, chunk, labelled, mesh=None):
    """(what it costs, parameters' shapes) of losses and gradients."""
    objective = PhaseLoss(model.bind(config, mesh), Head.of(config, 3, mesh, chunk=chunk), (None,))
    params = jax.eval_shape(lambda: model.init(config, jax.random.key(0)))
    where = None
    if mesh is not None:
        where = sharding.parameters(mesh, params)
        params = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), params, where
        )
    out = None if where is None else (sharding.replicated(mesh), where)
    run = jax.jit(lambda params, part: objective.loss_and_grads(params, (part,)), out_shardings=out)
    return run.lower(params, labelled).compile().as_text(), params


def test_flops_are_those_of_the_compiled_step():
    """To the last one, if attention computes all pairs and the head has full chunks."""
    rows, length, chunk = 4, 8, 16
    text, _ = compiled(DIT, chunk, labelled_shapes(rows, length))
    predicted, tokens = rows * length, 2 * rows * length
    cost = hlo.analyse(
        text,
        trip_counts={"predicted_chunks": predicted / chunk},
        kinds={"predicted_chunks": "head"},
    )
    wanted = lower_bound.flops(DIT, Work(tokens, predicted, tokens * 2 * length))
    assert cost.flops_by_kind["head"] == wanted["head"]
    assert cost.flops == sum(wanted.values())


def test_what_chips_send_and_compute_is_that_of_the_compiled_step():
    settings = default_config().mesh
    settings.data, settings.fsdp, settings.tensor = 2, 2, 2
    mesh = sharding.make_mesh(settings)
    rows, length = 8, 8
    text, params = compiled(LLAMA, 16, labelled_shapes(rows, length, mesh), mesh)
    cost = hlo.analyse(text, trip_counts={"predicted_chunks": 1})
    tokens, predicted = 2 * rows * length, rows * length
    work = Work(tokens, predicted, tokens * 2 * length)
    assert cost.flops == sum(lower_bound.flops(LLAMA, work).values()) / 8
    wanted = lower_bound.collective_bytes(default_config(), LLAMA, work, mesh, params)
    assert cost.collectives["all-gather"] == wanted["all-gather"]
    assert cost.collectives["reduce-scatter"] == wanted["reduce-scatter"]
    # Beside that, three scalars, and three numbers a predicted token for a split softmax.
    softmax = lower_bound.gather_bytes(2 * 3 * 4 * predicted / 4, 2)
    more = cost.collectives["all-reduce"] - wanted["all-reduce"]
    assert softmax < more <= softmax + 3 * lower_bound.gather_bytes(2 * 4, 8)


# Pods.


def test_every_known_pod_is_parsed():
    for name, known in topology.KNOWN.items():
        chip = chips.CHIPS[name]
        for shape in known:
            parsed = topology.parse(f"{name}:{shape}")
            assert dataclasses.replace(parsed, link_bandwidth=chip.link_bandwidth) == chip
    assert topology.num_chips("v5e:16x16") == 256 and topology.num_chips("v4:4x4x8") == 128
    assert topology.num_chips("h100:8") == 8 and topology.num_chips("h100:8x8") == 64


def test_nodes_of_gpus_are_joined_by_their_network():
    chip = chips.CHIPS["h100"]
    assert topology.parse("h100:8").link_bandwidth == chip.link_bandwidth
    assert topology.parse("h100:8x8").link_bandwidth == chip.node_bandwidth < chip.link_bandwidth
    assert topology.parse("v5e:4x4").link_bandwidth == chips.CHIPS["v5e"].link_bandwidth


def test_gpus_have_no_slices():
    with pytest.raises(UserError, match=r"--num_slices=2: must be 1 with --topology=h100:8"):
        topology.devices("h100:8", num_slices=2)


@pytest.mark.parametrize(("name", "extra"), [("v5e:4x4", "tpu"), ("h100:8", "gpu-compiler")])
def test_missing_compiler_is_told(name, extra, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(UserError, match=re.escape(f"pip install 'esolm_jax[{extra}]'")):
        topology.devices(name)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("v5e:16x15", "(did you mean 'v5e:16x16'?)"),
        ("v5p:16x16", "--topology=v5p:16x16: must be one of"),
        ("h100:9", "--topology=h100:9: must be one of v4: 2x2x1"),
        ("b200:8", "must be one of v4: 2x2x1"),
        ("", "--topology=: must be one of"),
    ],
)
def test_unknown_pod_is_told(name, told):
    with pytest.raises(UserError, match=re.escape(told)) as error:
        topology.devices(name)
    assert topology.listed() in str(error.value)
