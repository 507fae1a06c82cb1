"""What all tests share."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# A loaded machine is slow at times, which is no defect. A test's own settings win.
settings.register_profile("step", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("step")
