"""Logits, losses and likelihoods of one forward pass against the published implementation."""

import jax
import numpy as np
import pytest
from golden_files import close, model, vectors

from esolm_jax.family import ar, eso_a, eso_b, mdlm, noise
from esolm_jax.family.rule import dense_mask
from esolm_jax.model import lm_head as loss

MASK = 66

# One program each, not one per operation.
token_nll = jax.jit(loss.token_nll, static_argnums=2)
mask_of = jax.jit(lambda tokens: dense_mask(tokens, tokens))
label_ar = jax.jit(ar.label, static_argnames="start")


def run(golden, labelled):
    """Logits [B, P, V] and unweighted −log p [B, P] of a labelled batch."""
    reference = model(str(golden["weights"]))
    tokens = labelled.tokens
    logits = reference.logits(tokens.token, tokens.position, tokens.rank, tokens.in_context)
    logits = np.asarray(logits)[:, : labelled.target.shape[1]]
    return logits, token_nll(logits, labelled.target, MASK)


def inverse(order):
    return np.argsort(order, axis=1)


def text_order(sorted_BL, order):
    return np.take_along_axis(np.asarray(sorted_BL), inverse(order), axis=1)


DIFFUSION = {
    "01_diffusion_causal": eso_b.label_diffusion,
    "01b_diffusion_causal_alpha1": eso_b.label_diffusion,
    "02_diffusion_mixed2_noshuffle": eso_a.label_diffusion,
    "02b_diffusion_mixed2_shuffle": eso_a.label_diffusion,
}


@jax.jit
def _log_probs(logits):
    return jax.nn.log_softmax(loss.exclude_mask_token(logits, MASK), axis=-1)


@pytest.mark.parametrize("case", DIFFUSION)
def test_diffusion(case):
    golden = vectors(case)
    x, order, masked = golden["x0"], golden["sort_idx"], golden["zt"] == MASK
    valid = np.ones_like(masked)
    alpha_0 = float(golden["alpha_0"])
    close(noise.alpha(golden["t"], alpha_0), golden["alpha_t"])
    close(noise.dalpha(alpha_0), golden["dalpha_t"])
    weight = np.where(masked, noise.elbo_weight(golden["t"][:, None], alpha_0), 0)
    label = jax.jit(DIFFUSION[case], static_argnames="mask")
    labelled = label(x, valid, masked, order, weight, mask=MASK)
    np.testing.assert_array_equal(mask_of(labelled.tokens), golden["attn_mask"])
    logits, nll = run(golden, labelled)
    close(logits, golden["logits"])
    log_probs = np.asarray(_log_probs(logits))
    is_masked = np.take_along_axis(masked, order, axis=1)
    close(log_probs[is_masked][:, :MASK], golden["log_probs"][is_masked][:, :MASK])
    close(labelled.weight * nll, golden["nll_elbo"])
    close((labelled.weight > 0) * nll, golden["nll_low_var"])


SEQUENTIAL = {
    "04_sequential_causal_a0d5": eso_b.label_sequential,
    "04_sequential_causal_a0d125": eso_b.label_sequential,
    "05_sequential_mixed_a0d5": eso_a.label_sequential,
    "05_sequential_mixed_a0d125": eso_a.label_sequential,
    "06_sequential_causal_alpha0": eso_b.label_sequential,
    "06b_sequential_mixed_alpha0": eso_a.label_sequential,
}


@pytest.mark.parametrize("case", SEQUENTIAL)
def test_sequential(case):
    golden = vectors(case)
    x, order, masked = golden["x0"], golden["sort_idx"], golden["z0"] == MASK
    label = jax.jit(SEQUENTIAL[case], static_argnames="mask")
    labelled = label(x, np.ones_like(masked), masked, order, masked, mask=MASK)
    predicted = np.take_along_axis(masked, order, axis=1)
    logits, nll = run(golden, labelled)
    close(logits[predicted], golden["logits"][predicted])
    close(labelled.weight * nll, golden["recon_loss"])
    mask = np.asarray(mask_of(labelled.tokens))
    length = x.shape[1]
    np.testing.assert_array_equal(
        mask[:, :length][predicted], golden["attn_mask"][:, :length][predicted]
    )


def test_bidirectional():
    """Fixed in generation order, but all of one rank."""
    golden = vectors("03_diffusion_bidirectional")
    order = golden["sort_idx"]
    logits = model(str(golden["weights"])).logits(
        golden["zt_sorted"], order, np.zeros_like(order), np.ones(order.shape, bool)
    )
    close(logits, golden["logits"])
    assert golden["attn_mask"].all()


def test_mdlm():
    golden = vectors("08_mdlm")
    masked = golden["xt"] == MASK
    weight = np.where(masked, noise.elbo_weight(golden["t"][:, None], 1.0), 0)
    labelled = mdlm.label(golden["x0"], np.ones_like(masked), masked, weight, mask=MASK)
    logits, nll = run(golden, labelled)
    close(logits, golden["logits"])
    close(labelled.weight * nll, golden["nll_elbo"])
    close(masked * nll, golden["nll_low_var"])


def test_time_embedding():
    """Away from σ = 0, where it is not just a learned constant."""
    from esolm_jax.model import transformer as model_lib

    golden = vectors("08_mdlm")
    reference = model("weights_dit")
    labelled = mdlm.label(
        golden["x0"],
        np.ones(golden["x0"].shape, bool),
        golden["xt"] == MASK,
        np.zeros(golden["x0"].shape),
        mask=MASK,
    )
    logits = jax.jit(model_lib.bind(reference.config))(
        reference.params, labelled.tokens, sigma_B=golden["sigma_nonzero"]
    )
    close(logits, golden["logits_sigma_nonzero"])


@pytest.mark.parametrize("start", ["none", "bos", "mask"])
def test_ar(start):
    golden = vectors(f"07_ar_{start}")
    x, valid = golden["output_tokens"], golden["valid_out"].astype(bool)
    labelled = label_ar(x, valid, start=0)
    tokens = labelled.tokens.replace(
        token=labelled.tokens.token.at[:, 0].set(golden["input_tokens"][:, 0])
    )
    np.testing.assert_array_equal(tokens.token, golden["input_tokens"])
    logits, nll = run(golden, labelled.replace(tokens=tokens))
    close(logits, golden["logits"])
    close(labelled.weight * nll, golden["nll"] * golden["valid_out"])


@pytest.mark.parametrize("case", ["10_any_order_a0d0", "10_any_order_a0d5", "10_any_order_a1d0"])
def test_any_order_likelihood(case):
    golden = vectors(case)
    x = golden["x0"]
    everything = np.ones(x.shape, bool)
    label = jax.jit(eso_b.label_sequential, static_argnames="mask")
    log_p = []
    for k, sigma in enumerate(golden["sort_idx"]):
        order = np.broadcast_to(sigma, x.shape)
        labelled = label(x, everything, everything, order, everything, mask=MASK)
        logits, nll = run(golden, labelled)
        log_p.append(-nll)
        if k == 0:
            close(logits, golden["logits_first_order"])
    log_p = np.stack(log_p, axis=1)
    close(log_p, golden["logp_per_token"])
    close(log_p.sum(-1), golden["logp_per_seq_per_order"], 1e-4)  # sums of 32 terms
