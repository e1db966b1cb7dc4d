"""The cases that an activation offloader must get right, by theme; docs/cases.md lists them with their tests."""
