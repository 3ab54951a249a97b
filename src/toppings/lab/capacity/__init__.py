"""Planning a fleet: how many servers, run how, keep the objectives for a load, found by simulation."""
