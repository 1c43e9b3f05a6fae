"""Training: the tiny base as a language model, and DPO through TRL (the only user of TRL)."""
