"""Two real engines of one small model on this machine behind the real router, held against simulations."""
