"""Softmax attention under the rule of labels: one signature, several implementations.

attend.py     attend(): chooses an implementation and shards it over the mesh
dense.py      reference implementation that materializes the scores of all pairs
recompute.py  the custom VJP of chunked.py and flash.py, padding, and the mask of skipped blocks
chunked.py    XLA in chunks, in linear memory, on any device
kernel_products.py  the matrix product and the sum of kernels, and the sizes that Triton multiplies
flash.py      block-sparse Pallas kernels for GPUs, for any labels; flash_kernels.py: their programs
cudnn.py      NVIDIA's library, for layouts without query copies
splash.py     a block-sparse Pallas kernel for TPUs, for labels that follow from a layout
"""
