"""Executes the code that a GPU's compiler makes of our kernels, on a CPU and with NumPy.

    program.py: the instructions of a kernel, read from PTX (NVIDIA's assembly language)
    memory.py: a GPU's memory and the shared memory of programs; notices races of programs, and of
        warps between two barriers
    machine.py: runs all lanes (threads of all programs) at once
    scalar.py, matrix.py: what instructions compute

Instructions that our kernels do not have are errors. Semantics: NVIDIA's "PTX ISA", section 9.7.
Products of warpgroups (wgmma) are done at once, so it does not show that one is not waited for.
"""
