"""Whether PyTorch computes the exported logits and texts of expected.npz.

python check_esolm.py [FOLDER]      # by default the folder of this file
"""

import pathlib
import sys

import numpy as np
import torch
from transformers import AutoModelForMaskedLM

TOLERANCE = 2e-5  # of a logit, relative to the largest one if that is above 1


def check(folder):
    """(largest error of a logit, largest logit, fraction of equal tokens of greedy and of drawn
    texts)."""
    model = AutoModelForMaskedLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32
    ).eval()
    expected = np.load(pathlib.Path(folder) / "expected.npz")
    names = ("token", "position", "rank", "in_context")
    token, position, rank, in_context = (torch.from_numpy(expected[name]) for name in names)
    wanted = expected["logits"]
    with torch.no_grad():
        labels = {"position_ids": position.long(), "rank": rank.long(), "in_context": in_context}
        logits = model(token.long(), **labels).logits.numpy()[:, : wanted.shape[1]]
    equal = []
    for name, temperature in (("greedy", 0.0), ("drawn", 1.0)):
        text, seed = expected[name], int(expected["seed"])
        size = {"num_texts": len(text), "length": text.shape[1]}
        found = model.generate(seed=seed, temperature=temperature, **size).numpy()
        equal.append(float((found == text).mean()))
    return float(np.abs(logits - wanted).max()), float(np.abs(wanted).max()), *equal


if __name__ == "__main__":
    place = sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).resolve().parent
    error, largest, greedy, drawn = check(str(place))
    print(f"logits: largest error {error:.1e}, largest logit {largest:.1f}")
    print(f"equal tokens: {greedy:.1%} of greedy texts, {drawn:.1%} of drawn texts")
    good = error <= TOLERANCE * max(1.0, largest) and greedy == 1.0 and drawn == 1.0
    sys.exit(0 if good else 1)
