"""Mutants of the engine, made from its syntax tree, and the small scenarios that must notice every one of them.

operators    source → mutants: one event record, wait, version comparison, lock, … taken out of each
loading      the engine's modules anew, one of them mutated
locksets     which locks guard what two threads touch (Eraser), with the accesses written into the source
scenarios/   what is done to an engine; each raises where something is wrong
"""
