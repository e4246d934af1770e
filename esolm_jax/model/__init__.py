"""The transformer: labelled tokens → hidden states → the loss.

transformer.py   blocks, the forward pass, and its views as pure functions (init, bind)
model_config.py  sizes and policies of a transformer
layers.py        norms, dropout, activation, time embedding, adaLN
rope.py          rotary position embeddings
linear.py        linear layers and embeddings with explicit collectives
lm_head.py       chunked cross-entropy of the predicted tokens only
row_sums.py      sums over rows of logits, in few passes
build.py         the model of a config, sharded over a mesh
finite.py        refuses non-finite weights by the name of the tensor
"""
