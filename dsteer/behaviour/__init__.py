"""What steering does to behaviour: metrics of logits and of texts."""
