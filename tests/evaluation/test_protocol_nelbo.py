"""The published sums of the NELBO from the published code's own noise: κ-split, MDLM, AR, IW."""

import functools
import math

import jax
import numpy as np
import pytest
from golden_eval import read_npz
from golden_files import model

from esolm_jax.errors import UserError
from esolm_jax.evaluation.protocol import published_nelbo as nelbo
from esolm_jax.family import eso_b
from esolm_jax.model import lm_head
from esolm_jax.model import transformer as model_lib

MASK, BOS = 66, 1
GOLDEN = read_npz("nelbo_split.npz")
ESO = ("esob_k050", "esob_padded", "esoa_k050", "esob_k025", "esob_alpha1", "esob_alpha0")
MDLM = ("mdlm", "mdlm_padded")
AR = {"ar_none": None, "ar_bos": BOS, "ar_mask": MASK}
ROWS = 6  # of one pass: batches are filled up, so that one program serves them all


@functools.cache
def program(weights: str):
    """(labelled, order or None) → token nll, as one program per kind of labels."""
    published = model(weights)
    head = lm_head.Head.of(published.config, MASK)
    apply = model_lib.bind(published.config)
    run = jax.jit(functools.partial(nelbo.token_nll, apply, head))
    return functools.partial(run, published.params)


def filled_up(array):
    """ROWS rows: the last one is repeated."""
    if array is None:
        return None
    return np.concatenate([array, np.repeat(array[-1:], ROWS - len(array), axis=0)])


def batches(run: str) -> list[dict]:
    found = []
    for i in range(len(GOLDEN[f"{run}.batch_sizes"])):
        prefix = f"{run}.b{i}."
        names = [name for name in GOLDEN if name.startswith(prefix)]
        found.append({name.removeprefix(prefix): GOLDEN[name] for name in names})
    return found


def term(run: str, x, noise: nelbo.Noise):
    """The nll of one term's rows [rows, L]."""
    objective = "mdlm" if run in MDLM else str(GOLDEN[f"{run}.objective"])
    rows = len(x)
    noise = nelbo.Noise(*map(filled_up, (noise.masked, noise.order_BL, noise.t_B)))
    alpha_0 = float(GOLDEN[f"{run}.alpha_0"])
    labelled = nelbo.label(objective, filled_up(x), noise, alpha_0=alpha_0, mask=MASK)
    return np.asarray(program("weights_dit")(labelled, noise.order_BL))[:rows]


def close_per_token(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5)


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=0)


def check_batch(got: nelbo.BatchNelbo, batch: dict):
    assert got.num_tokens == batch["batch_tokens"]
    close(got.nll, batch["batch_nll"])
    close(got.loss, batch["batch_loss"])
    close(got.sequential_term, batch["batch_sequential_term"])


def check_figures(run: str, found: list[nelbo.BatchNelbo]):
    figures = nelbo.nelbo_figures(found)
    close(figures["nll"], GOLDEN[f"{run}.final_nll"])
    close(figures["perplexity"], GOLDEN[f"{run}.final_ppl"])
    close(figures["bits_per_token"], GOLDEN[f"{run}.final_bpd"])
    if f"{run}.final_sequential_bpd" in GOLDEN:
        close(figures["sequential_bits_per_token"], GOLDEN[f"{run}.final_sequential_bpd"])


@pytest.mark.parametrize("run", ESO)
def test_kappa_split(run):
    found = []
    for batch in batches(run):
        x, diffusion, sequential = batch["x0"], None, None
        rows = nelbo.diffusion_rows(len(x), float(GOLDEN[f"{run}.kappa"]))
        assert rows == batch["diffusion_rows"]
        if rows:
            masked = batch["xt"] == MASK
            noise = nelbo.Noise(masked, batch["diffusion_sort"], batch["t"])
            diffusion = term(run, x[:rows], noise)
            close_per_token(diffusion, batch["diffusion_nll"])
        if rows < len(x):
            noise = nelbo.Noise(batch["z0"] == MASK, batch["sequential_sort"])
            sequential = term(run, x[rows:], noise)
            close_per_token(sequential, batch["sequential_nll"])
        found.append(nelbo.BatchNelbo.of(batch["valid"], diffusion, sequential))
        check_batch(found[-1], batch)
        sums = found[-1].diffusion, found[-1].sequential
        close(sums, [batch.get(f"{name}_sum", 0) for name in ("diffusion", "sequential")])
        assert (found[-1].diffusion_tokens, found[-1].sequential_tokens) == (
            batch["diffusion_tokens"],
            batch["sequential_tokens"],
        )
    check_figures(run, found)


@pytest.mark.parametrize("run", MDLM)
def test_mdlm(run):
    found = []
    for batch in batches(run):
        noise = nelbo.Noise(batch["xt"] == MASK, None, batch["t"])
        nll = term(run, batch["x0"], noise)
        close_per_token(nll, batch["diffusion_nll"])
        found.append(nelbo.BatchNelbo.of(batch["valid"], nll))
        check_batch(found[-1], batch)
    check_figures(run, found)


@pytest.mark.parametrize("run", AR)
def test_ar(run):
    found = []
    for batch in batches(run):
        labelled = nelbo.label_ar(filled_up(batch["x0"]), AR[run])
        nll = np.asarray(program("weights_ar")(labelled))[: len(batch["x0"])]
        close_per_token(nll, batch["nll"])
        found.append(nelbo.BatchNelbo.of(batch["valid"], nll))
        check_batch(found[-1], batch)
    check_figures(run, found)


def test_importance_weighted():
    found = []
    for batch in batches("esob_iw"):
        x = filled_up(batch["x0"])
        everything = np.ones(x.shape, bool)
        log_p = []
        for order in batch["orders"]:
            order_BL = np.broadcast_to(order, x.shape)
            labelled = eso_b.label_sequential(
                x, everything, everything, order_BL, everything, mask=MASK
            )
            nll = np.asarray(program("weights_dit")(labelled, order_BL))[: len(batch["x0"])]
            log_p.append(-nll.sum(axis=1, dtype=np.float64))
        log_p = np.stack(log_p, axis=1)
        close_per_token(log_p / x.shape[1], batch["logp_per_order"] / x.shape[1])
        nll, tokens = nelbo.importance_weighted(log_p), batch["x0"].size
        assert tokens == batch["batch_tokens"]
        close(nll, batch["batch_nll"])
        found.append(nelbo.BatchNelbo(nll, tokens))
    check_figures("esob_iw", found)


def test_weights_of_the_mean_are_the_tokens_of_the_diffusion_rows():
    """The fault that is reproduced: it moves the perplexity of `esob_k050` by 2 %."""
    found = [
        nelbo.BatchNelbo.of(batch["valid"], batch["diffusion_nll"], batch["sequential_nll"])
        for batch in batches("esob_k050")
    ]
    sound = sum(
        sum(getattr(batch, name) for batch in found)
        / sum(getattr(batch, f"{name}_tokens") for batch in found)
        for name in ("diffusion", "sequential")
    )
    assert nelbo.nelbo_figures(found)["perplexity"] == pytest.approx(66.41, abs=0.005)
    assert math.exp(sound) == pytest.approx(64.96, abs=0.005)


@pytest.mark.parametrize("rows, kappa", [(1, 0.5), (3, 0.25)])
def test_batches_without_a_row_for_the_diffusion_are_refused(rows, kappa):
    with pytest.raises(UserError, match=f"kappa={kappa}: leaves no row of a batch of {rows}"):
        nelbo.diffusion_rows(rows, kappa)
    with pytest.raises(UserError, match="batches: must have at least one token"):
        nelbo.nelbo_figures([])
