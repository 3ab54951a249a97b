"""A policy's first decision, made before a request waits for it: compiled code takes a second to load."""

from toppings.cluster.fleet import Fleet
from toppings.cluster.perf_model import load_perf_model
from toppings.cluster.policies import make_policy
from toppings.cluster.snapshot import InstanceSnapshot, RequestSnapshot


def warm_up(policy: str) -> None:
    """Have a policy of this name decide over a made-up server. Raises ValueError for an unknown name."""
    fleet = Fleet([InstanceSnapshot(instance_id="warm-up", perf_model=load_perf_model("published"))])
    make_policy(policy).choose(RequestSnapshot("warm-up", "adapter", 8, 1, 1.0), fleet)
