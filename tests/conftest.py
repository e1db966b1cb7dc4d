"""What every test shares: one Hypothesis profile, so that a test that passes passes again."""

from __future__ import annotations

import os

from hypothesis import settings

# Fixed seed and no time limit: the machines that run the tests are small and shared.
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=50, print_blob=True)
settings.register_profile("long", derandomize=False, deadline=None, max_examples=2000, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
