"""Starts what a benchmark needs, measures it, and reports it as ratios."""
