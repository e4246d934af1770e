"""Whether `transformers` computes our logits of a model that `convert --to=FOLDER/` wrote.

python tests/data/check_hf.py ours WORKDIR FOLDER      # here: writes FOLDER, and our logits
python tests/data/check_hf.py theirs FOLDER            # with PyTorch and transformers: compares
"""

import pathlib
import sys

import numpy as np

FILE = "our_logits.npz"


def ours(workdir: str, folder: str) -> None:
    from esolm_jax import assemble, checkpoint, sharding
    from esolm_jax.interop import to_hub
    from esolm_jax.labels import Tokens

    config = checkpoint.saved_config(workdir)
    to_hub.convert(config, pathlib.Path(workdir), pathlib.Path(folder), "ema")
    trained = assemble.load_trained(config, workdir, "ema", sharding.make_mesh(config.mesh))
    ids = trained.meta["tokenizer"]["vocab_size"]
    token = np.random.default_rng(0).integers(0, ids, (4, 64)).astype(np.int32)
    index = np.broadcast_to(np.arange(64, dtype=np.int32), token.shape)
    tokens = Tokens(token, index, index, np.ones(token.shape, bool))
    logits = np.asarray(trained.built.apply(trained.params, tokens))[..., :ids]
    np.savez(pathlib.Path(folder) / FILE, tokens=token, logits=logits)
    print(f"wrote {folder} and {FILE} in it")


def theirs(folder: str) -> None:
    import torch
    import transformers

    saved = np.load(pathlib.Path(folder) / FILE)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(saved["tokens"]).long()).logits.numpy()
    error = np.abs(logits - saved["logits"]).max()
    largest = np.abs(logits).max()
    print(f"{type(model).__name__}: {error:.1e} apart, logits up to {largest:.1f}")
    assert error < 2e-5 * max(1, largest)


if __name__ == "__main__":
    {"ours": ours, "theirs": theirs}[sys.argv[1]](*sys.argv[2:])
