"""From a trace to facts about it, and to other traces: when storages live, what may be encoded or recomputed, what
its step would be as another framework, rank or plan runs it. Nothing here knows how a plan is chosen or simulated.
"""
