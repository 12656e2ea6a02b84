"""Writing text with a trained model: a single-process decoder with MLA's latent cache."""
