"""What names of transformers that are private or may move must still mean."""

import pytest
import tiny
import torch

from rgtg_fast.models.foreign import streamer_of_caller


class Streamer:
    def put(self, value):
        pass

    def end(self):
        pass


@pytest.mark.parametrize("streamer", [None, Streamer()], ids=["none", "one"])
def test_generate_holds_its_streamer_where_it_is_looked_for(streamer):
    lm, seen = tiny.llama_lm(), []

    def callable(model, input_ids, **options):
        seen.append((streamer_of_caller(model), streamer_of_caller(tiny.llama_lm())))
        return input_ids

    lm.generate(torch.ones(1, 3).long(), custom_generate=callable, streamer=streamer)
    assert seen == [(streamer, None)]


def test_no_streamer_outside_of_generate():
    assert streamer_of_caller(tiny.llama_lm()) is None
