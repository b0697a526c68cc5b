import math

import pytest

from edgekit.recipe import Train
from edgekit.train import learning_rate


def test_multistep_and_cosine_schedules():
    steps = Train(learning_rate=0.1, schedule="multistep", milestones=(0.5, 0.75), gamma=0.1)
    assert [learning_rate(steps, at) for at in (0, 0.49, 0.5, 0.8)] == pytest.approx([0.1, 0.1, 0.01, 0.001])
    cosine = Train(learning_rate=0.2, schedule="cosine", warmup=0.2)
    assert learning_rate(cosine, 0.1) == pytest.approx(0.1)
    assert learning_rate(cosine, 0.2) == pytest.approx(0.2)
    assert learning_rate(cosine, 0.6) == pytest.approx(0.1 * (1 + math.cos(math.pi / 2)))
    assert learning_rate(cosine, 1.0) == pytest.approx(0)
