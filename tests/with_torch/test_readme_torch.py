"""The README's code for PyTorch runs."""

import torch

from tests.test_readme import code


def test_code_runs():
    (block,) = code("torch")
    names: dict[str, object] = {}
    torch.manual_seed(0)
    exec(block, names)
    (table, *_) = names["model"].parameters()
    (touched,) = names["optimizer"].state[table]["square_avg"].any(dim=1).nonzero(as_tuple=True)
    assert 0 < len(touched) <= 32
