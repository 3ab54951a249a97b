"""Loads for running servers, comparisons of the loading modes, reports on step logs; speaks HTTP only."""
