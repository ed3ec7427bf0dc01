"""The contest of `benchmarks/peers.py`: contestants, each in a process of its own, and what is made of their times."""
