"""Tracing on models that were pretrained: `python -m benchmarks.pretrained minilm` and `smollm2`."""
