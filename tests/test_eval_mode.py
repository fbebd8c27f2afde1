"""A model that is evaluated returns to the mode it was in."""

import pytest
import torch

import megafn as mf
from equivalence import tiny
from megafn.runtime.model.eval_mode import eval_mode


def test_every_module_returns_to_its_own_mode():
    chunk = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.Dropout()))
    chunk[1].eval()  # frozen by the user
    modes = [module.training for module in chunk.modules()]
    assert modes == [True, True, False, False]
    with eval_mode([chunk]):
        assert not any(module.training for module in chunk.modules())
    assert [module.training for module in chunk.modules()] == modes
    with pytest.raises(KeyError), eval_mode([chunk]):
        raise KeyError
    assert [module.training for module in chunk.modules()] == modes


@pytest.mark.parametrize("training", [True, False])
def test_logits_leave_the_mode_as_it_was_even_if_the_model_raises(training, monkeypatch):
    config = tiny()
    tokens = torch.zeros(1, 8, dtype=torch.long)
    with mf.init_groups(mf.build_groups(config.parallel, world_size=1)) as pg:
        state = mf.setup(config, pg)
        (chunk,) = state.chunks
        chunk.train(training)
        mf.logits(state, tokens)
        assert all(module.training == training for module in chunk.modules())

        def fails(*_, **__):
            assert not chunk.training
            raise RuntimeError("out of memory")

        monkeypatch.setattr(chunk, "forward", fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            mf.logits(state, tokens)
        assert all(module.training == training for module in chunk.modules())
