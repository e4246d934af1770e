"""The transformer: labelled tokens → hidden states → the loss.

transformer.py  ModelConfig, init and the forward pass
linear.py       linear layers and embeddings with explicit collectives
lm_head.py      chunked cross-entropy of the predicted tokens only
build.py        the model of a config, sharded over a mesh
finite.py       refuses non-finite weights by the name of the tensor
"""
