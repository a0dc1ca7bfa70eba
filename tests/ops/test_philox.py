import math
import random

import numpy as np
import pytest
import torch
from scipy import stats

from rgtg_fast import _C
from rgtg_fast.ops import reference

# Random123's published known-answer vectors for philox4x32-10: counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def words(text):
    return [int(word, 16) for word in text.split()]


def torch_philox(counter, key):
    as_tensors = [torch.tensor(word) for word in (*counter, *key)]
    return [int(w) for w in reference.philox4x32_10(tuple(as_tensors[:4]), tuple(as_tensors[4:]))]


@pytest.mark.parametrize("philox", [_C.philox4x32_10, torch_philox])
@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_philox_known_answers(philox, counter, key, result):
    assert list(philox(words(counter), words(key))) == words(result)


def gumbel(draw):
    """Noise by the torch implementation from a list of 32-bit words."""
    return reference.gumbel_from_word(torch.tensor(draw, dtype=torch.int64))


def edge_words():
    rng = random.Random(0)
    edges = [0, 1, 2, 2**23, 2**24 - 1, 2**24 + 1, 2**31, 2**32 - 2**9, 2**32 - 2, 2**32 - 1]
    # Around v = 1 - sqrt(1/2), where the two forms of the logarithm meet.
    switch = int((1 - math.sqrt(0.5)) * 2**32)
    return edges + list(range(switch - 600, switch + 600)) + rng.choices(range(2**32), k=50_000)


def test_gumbel_noise_is_bit_identical_in_cpp_and_torch():
    draw = edge_words()
    assert gumbel(draw).tolist() == [_C.gumbel_from_word(word) for word in draw]


def test_gumbel_noise_is_close_to_the_exact_transform_at_both_tails():
    draw = edge_words()
    v = (np.array(draw, dtype=np.float64) + 0.5) * 2.0**-32
    exact = -np.log(-np.log1p(-v))
    assert np.abs(gumbel(draw).numpy() - exact).max() < 3e-6
    assert gumbel([0]).item() == pytest.approx(-math.log(2.0**-33), rel=1e-6)
    assert gumbel([2**32 - 1]).item() == pytest.approx(-math.log(33 * math.log(2)), rel=1e-6)


def test_gumbel_noise_follows_the_gumbel_law():
    count = 500_000
    seeds = torch.full((count,), 7, dtype=torch.int64)
    noise = reference.gumbel_noise(seeds, torch.arange(count), torch.full_like(seeds, 42)).double()
    variance = math.pi**2 / 6
    assert abs(noise.mean().item() - np.euler_gamma) < 4 * math.sqrt(variance / count)
    # The fourth central moment of the law is 22 / 5 + 1 kurtosis units: 5.4 variance^2.
    assert abs(noise.var().item() - variance) < 4 * variance * math.sqrt(4.4 / count)
    assert stats.kstest(noise.numpy(), stats.gumbel_r.cdf).pvalue > 1e-3


@pytest.mark.parametrize("changed", ["seed", "position", "id"])
def test_noise_of_neighbouring_counters_is_uncorrelated(changed):
    count = 200_000
    base = {"seed": torch.full((count,), 3), "position": torch.full((count,), 5)}
    base["id"] = torch.full((count,), 11)
    base[changed] = torch.arange(count)
    noise = reference.gumbel_noise(base["seed"], base["position"], base["id"]).double()
    correlation = np.corrcoef(noise[:-1].numpy(), noise[1:].numpy())[0, 1]
    assert abs(correlation) < 4 / math.sqrt(count)
