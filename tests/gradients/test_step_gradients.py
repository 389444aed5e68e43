"""The losses of a step, where all processes must call the model equally often."""

import torch

from hf_doge.gradients.alignment import RandomReplay
from hf_doge.training.step_gradients import MicroBatch, StepGradients


def test_a_process_without_an_example_keeps_up_with_the_others():
    made_up = []
    spare = MicroBatch({"labels": torch.tensor([[5, 6], [7, 8]])}, torch.tensor([0, 1]), labels_are_shifted=False)
    step = StepGradients(
        [],
        [],
        num_items=torch.tensor([4, 3]),
        target_items=torch.tensor([2]),
        target_weights={0: 1.0},
        compute_loss=None,
        backward=None,
        replay=RandomReplay(torch.device("cpu")),
        device=torch.device("cpu"),
        num_calls=([2, 1], [3]),
        call_for_nothing=lambda piece: made_up.append(piece.inputs["labels"].tolist()),
        spare=spare,
    )
    assert [float(step.backward(0)), len(made_up)] == [0.0, 2]
    assert [float(step.backward(1)), len(made_up)] == [0.0, 3]
    assert [float(step.target_backward(0)), len(made_up)] == [0.0, 6]
    assert made_up == [[[5, 6]]] * 6
