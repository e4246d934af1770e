"""Scripts that `export` copies next to the artefacts. None of them imports esolm_jax."""
