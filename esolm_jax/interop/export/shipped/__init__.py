"""Scripts that `export` puts beside the artefacts. They stand alone: none imports esolm_jax."""
