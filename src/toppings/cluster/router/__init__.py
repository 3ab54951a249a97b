"""The router: an HTTP reverse proxy that places each request by a policy."""

from toppings.cluster.router.app import run_router
from toppings.cluster.router.settings import InstanceConfig, RouterConfig

__all__ = ["InstanceConfig", "RouterConfig", "run_router"]
