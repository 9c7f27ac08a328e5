"""torch modules shared by model families: linear, norm, rotary embedding, attention, embedding."""
