"""The losses of a step, where all processes must call the model equally often."""

import torch

from hf_doge.training.step_gradients import MicroBatch, NumCalls, StepGradients


class Calls:
    """A loss that is never asked for, and notes the calls that do not count."""

    device = torch.device("cpu")

    def __init__(self):
        self.made_up = []

    def call_for_nothing(self, piece):
        self.made_up.append(piece.inputs["labels"].tolist())


def test_a_process_without_an_example_keeps_up_with_the_others():
    loss = Calls()
    spare = MicroBatch({"labels": torch.tensor([[5, 6], [7, 8]])}, torch.tensor([0, 1]), labels_are_shifted=False)
    step = StepGradients(
        loss,
        [],
        [],
        num_items=torch.tensor([4, 3]),
        target_items=torch.tensor([2]),
        target_weights={0: 1.0},
        num_calls=NumCalls([2, 1], [3]),
        spare=spare,
    )
    assert [float(step.backward(0)), len(loss.made_up)] == [0.0, 2]
    assert [float(step.backward(1)), len(loss.made_up)] == [0.0, 3]
    assert [float(step.target_backward(0)), len(loss.made_up)] == [0.0, 6]
    assert loss.made_up == [[[5, 6]]] * 6
