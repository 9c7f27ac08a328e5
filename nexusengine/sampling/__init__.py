"""From logits to tokens: vectorised, reproducible whatever else is in the batch. Imports torch."""
