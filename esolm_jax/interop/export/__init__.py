"""A workdir → artefacts that run without esolm_jax, each checked against the model.

folder.py            writes the folder and its manifest
artefacts.py         the files that compute something; plain.py: their weights
weight_storage.py    the types in which weights are stored
signatures.py        inputs and outputs of the exported functions
stablehlo.py         StableHLO of score, step and sample; exported_sampler.py: sample
onnx_graph.py        ONNX of score and step
sampling_plan.py     how a family generates, as data
vocabulary.py        the tokenizer as data, for shipped code
parity.py            measures the error of every artefact
hub_folder.py        a folder for `transformers`, with its model card (hub_card.py); rounding.py:
                     in 16 bits
remote_code/         the PyTorch code in that folder
shipped/             scripts that are copied into the folder and import no esolm_jax
"""
