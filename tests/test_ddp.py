"""Data-parallel training: the gradient that the ranks agree on is that of one process with the whole batch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import ranks
import torch


def test_the_averaged_gradient_of_two_ranks_is_that_of_the_whole_batch(tmp_path: Path) -> None:
    whole = {case: ranks.gradients(*case, [0, 1, 2, 3], parallel=False) for case in ranks.CASES}
    meeting_place = str(tmp_path / "meet")
    other = subprocess.Popen([sys.executable, ranks.__file__, "1", meeting_place])
    try:
        parted = ranks.as_rank(0, meeting_place)
        assert other.wait(60) == 0
    finally:
        other.kill()
    for case, gradients in whole.items():
        assert gradients.keys() == parted[case].keys()
        largest = max(float(gradient.abs().max()) for gradient in gradients.values())
        assert largest > 1e-3, case
        for name, gradient in gradients.items():
            assert torch.allclose(parted[case][name], gradient, rtol=1e-4, atol=1e-6 * largest), (case, name)


def test_a_rank_alone_would_have_another_gradient() -> None:
    """Or the test above would prove nothing."""
    whole, part = (ranks.gradients("prompt", "ragged", images, parallel=False) for images in ([0, 1, 2, 3], [0, 1]))
    assert any(not torch.allclose(part[name], gradient, rtol=1e-2) for name, gradient in whole.items())
