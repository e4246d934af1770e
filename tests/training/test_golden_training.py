"""Training losses, their gradients and optimizer steps against the published implementation."""

import jax
import numpy as np
import optax
import pytest
from golden_files import close, model, vectors

from esolm_jax.family import ar, eso_a, eso_b, mdlm, noise
from esolm_jax.interop.published import names as published_names
from esolm_jax.model import lm_head as loss
from esolm_jax.model import transformer as model_lib
from esolm_jax.training import optimizer, phase_loss

MASK = 66
ESO = {"eso_a": eso_a, "eso_b": eso_b}


def labelled_batch(golden, family, alpha_0, low_variance=False):
    """The recorded noise, labelled. Published padding is attended to; only its loss is dropped."""
    x, valid = golden["x0"], golden["valid_tokens"].astype(bool)
    everything = np.ones_like(valid)

    def weight_of(masked, t):
        w = 1.0 if low_variance else noise.elbo_weight(t[:, None], alpha_0)
        return np.where(masked, w, 0)

    if family == "ar":
        part = ar.label(x, valid, start=1)
        return (part,)
    masked = golden["zt"] == MASK
    n = len(masked)
    weight = weight_of(masked, golden["t"]) * valid[:n]
    if family == "mdlm":
        parts = [mdlm.label(x, everything, masked, weight, mask=MASK)]
    else:
        diffusion = ESO[family].label_diffusion
        parts = [
            diffusion(x[:n], everything[:n], masked, golden["sort_idx_diff"], weight, mask=MASK)
        ]
    if "z0" in golden:
        sequential = ESO[family].label_sequential
        masked = golden["z0"] == MASK
        order = golden["sort_idx_seq"]
        parts.append(
            sequential(x[n:], everything[n:], masked, order, masked * valid[n:], mask=MASK)
        )
    rows = iter(np.split(valid, [len(p.target) for p in parts][:-1]))
    return tuple(p.replace(num_tokens=next(rows).sum(axis=1)) for p in parts)


CASES = {
    "13_train_esolmb": ("eso_b", 0.5, False),
    "13b_train_esolma": ("eso_a", 0.5, False),
    "13c_train_esolmb_alpha1_lowvar": ("eso_b", 1.0, True),
    "13d_train_mdlm": ("mdlm", 1.0, False),
    "13e_train_ar_bos": ("ar", 0.0, False),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_gradients_and_steps(case):
    golden = vectors(case)
    labelled = jax.jit(lambda: labelled_batch(golden, *CASES[case]))()
    start = model(str(golden["weights"]))
    apply = model_lib.bind(start.config)
    head = loss.Head.of(start.config, MASK, chunk=8)
    objective = phase_loss.PhaseLoss(apply, head, (None,) * len(labelled))
    loss_and_grads = jax.jit(objective.loss_and_grads)
    step = lambda params: loss_and_grads(params, labelled)  # noqa: E731
    losses, grads = step(start.params)
    close(losses.sum(), golden["loss"].reshape(()))
    published = published_names.to_published(grads)
    assert {f"g:{name}" for name in published} == {k for k in golden if k.startswith("g:")}
    for name, got in published.items():
        close(got, golden[f"g:{name}"])
    params, ema = start.params, start.params
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-4, eps=1e-8, weight_decay=0))
    state = adam.init(params)

    @jax.jit
    def update(params, ema, state, grads, n):
        updates, state = adam.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (
            params,
            optimizer.update_ema(ema, params, 0.9999, n + 1),
            state,
            optax.tree.norm(grads),
        )

    for n in range(3):
        losses, grads = step(params)
        close(losses.sum(), golden["losses"][n], 1e-4)
        params, ema, state, norm = update(params, ema, state, grads, n)
        close(norm, golden["grad_norms"][n], 1e-4)
    for prefix, tree in (("w3:", params), ("ema3:", ema)):
        for name, got in published_names.to_published(tree).items():
            if prefix + name in golden:  # tiny gradients may differ by O(lr) after Adam
                close(got, golden[prefix + name], 2e-3)
                assert np.mean(np.abs(got - golden[prefix + name]) > 1e-5) < 0.02, name
