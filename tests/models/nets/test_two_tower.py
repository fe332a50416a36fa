"""An untrained payload tower is the identity; InfoNCE is low if the right answer leads, and ignores own chunks."""

import torch
from torch.nn.functional import cross_entropy, normalize

from models.nets.two_tower import TEMPERATURE, PassageTower, info_nce


def units(*shape: int) -> torch.Tensor:
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))), dim=-1)


def test_an_untrained_payload_tower_is_the_identity() -> None:
    vectors = units(7, 16)
    assert torch.allclose(PassageTower(16)(vectors), vectors, atol=1e-6)


def test_the_loss_is_cross_entropy_both_ways() -> None:
    query, positive, negative = units(4, 8), units(4, 9)[:, :8], units(4, 3, 8)
    among = query @ positive.T / TEMPERATURE
    against = torch.stack([negative[i] @ query[i] for i in range(4)]) / TEMPERATURE
    truth = torch.arange(4)
    expected = (cross_entropy(torch.cat([among, against], 1), truth) + cross_entropy(among.T, truth)) / 2
    found = info_nce(query, positive, negative, torch.zeros(4, 4, dtype=torch.bool))
    assert torch.allclose(found, expected)


def test_passages_of_the_own_context_are_no_negatives() -> None:
    query, positive, negative = units(2, 8), units(2, 8), -units(2, 1, 8)
    own = torch.tensor([[False, True], [True, False]])
    same = info_nce(query, query, negative, own)  # each would lead for the other, too
    assert same < 1e-4
    assert torch.isfinite(info_nce(query, positive, negative, own))
