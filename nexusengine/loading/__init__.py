"""From a model name to its files, configuration and weights. `weights` and `safetensors_file` alone import torch."""
