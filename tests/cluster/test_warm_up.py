"""The router's first request waits for no compiled code."""

import subprocess
import sys

import pytest

from toppings.cluster.policies import POLICIES
from toppings.cluster.warm_up import warm_up

MADE_STATE = """
import sys
from toppings.cluster.router.settings import RouterConfig
from toppings.cluster.router.state import RouterState
assert "numba" not in sys.modules
RouterState(RouterConfig(policy="rank_aware"), None)
assert "toppings.cluster.scan" in sys.modules
"""


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_decides(policy: str) -> None:
    warm_up(policy)


def test_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown policy 'nearest'"):
        warm_up("nearest")


def test_router_has_loaded_compiled_code_before_its_first_request() -> None:
    subprocess.run([sys.executable, "-c", MADE_STATE], check=True)
