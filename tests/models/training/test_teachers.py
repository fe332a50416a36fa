"""A teacher is one stored version or the mean of several, loaded strictly, and of the student's space."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from models.recipe import Job
from models.registry.checkpoint import load_checkpoint
from models.registry.registry import Registry, RegistryError, Version
from models.runtimes.torch import build_net
from models.training.job import run_job
from models.training.teachers import UnfitTeacher, load_teachers
from models.vectors import Floats


def test_an_ensemble_answers_with_the_direction_of_the_mean(
    published: Registry, amn_version: Version, gru_version: Version, contexts: Callable[..., Floats]
) -> None:
    ensemble = load_teachers(published, [amn_version.id, gru_version.id], 16, 5)
    context = torch.from_numpy(contexts(7))
    with torch.inference_mode():
        answers = [build_net(load_checkpoint(version.path))(context) for version in (amn_version, gru_version)]
        assert torch.allclose(ensemble(context), normalize(answers[0] + answers[1], dim=1), atol=1e-6)
    assert not any(module.training for module in ensemble.modules())


def test_no_gradient_reaches_a_teacher(
    published: Registry, gru_version: Version, contexts: Callable[..., Floats]
) -> None:
    teacher: nn.Module = load_teachers(published, [gru_version.id], 16, 5)
    assert not teacher(torch.from_numpy(contexts(2))).requires_grad


@pytest.mark.parametrize(("dim", "length"), [(384, 5), (16, 4)])
def test_rejects_a_teacher_of_another_space(published: Registry, gru_version: Version, dim: int, length: int) -> None:
    with pytest.raises(
        UnfitTeacher, match=rf"gru/.* has D, T = \(16, 5\); the net in training has D, T = \({dim}, {length}\)"
    ):
        load_teachers(published, [gru_version.id], dim, length)


def test_rejects_a_missing_teacher(registry: Registry) -> None:
    with pytest.raises(RegistryError):
        load_teachers(registry, ["gru/20260101-0123456789ab"], 16, 5)


def test_a_distilled_net_learns_and_its_card_names_the_teachers(
    published: Registry, gru_version: Version, job_of: Callable[..., Job]
) -> None:
    plain = job_of("amn", name="distilled")
    recipe = replace(plain.recipe, teachers=(gru_version.id,), distil=1.0)
    version = run_job(replace(plain, recipe=recipe), published, lambda done, total: None, lambda said: None)
    card = load_checkpoint(version.path).card
    assert card.data["teachers"] == [gru_version.id]
    assert card.architecture == "amn"
