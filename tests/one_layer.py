"""The models of `tiny.py` with one layer, for laws that do not depend on how deep a model is: a step is a sixth quicker."""

from functools import partial

from tests import tiny

tiny_bert = partial(tiny.tiny_bert, num_layers=1)
tiny_classifier = partial(tiny.tiny_classifier, num_layers=1)
tiny_gpt2 = partial(tiny.tiny_gpt2, num_layers=1)
tiny_llama = partial(tiny.tiny_llama, num_layers=1)
