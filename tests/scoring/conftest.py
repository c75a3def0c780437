import pytest

from geomkd.scoring import score_layers as scoring


@pytest.fixture
def plans(monkeypatch):
    """Every plan that is made."""
    made, plan_of = [], scoring.plan_of

    def spy(*args, **options):
        made.append(plan_of(*args, **options))
        return made[-1]

    monkeypatch.setattr(scoring, "plan_of", spy)
    return made
