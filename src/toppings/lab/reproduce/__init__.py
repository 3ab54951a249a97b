"""The published evaluation (Li et al., "Toppings", USENIX ATC 2025) again, one verb per figure or table.

Each verb writes its figure as PDF and PNG, the JSON behind it, and a line per claim in `comparison.md`, the
published value beside ours. What is simulated rests on performance models, what is measured on this machine;
each says what differs from the publication.
"""
