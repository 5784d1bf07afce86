"""Floor 5: the planner. It estimates memory, communication and time of a run on devices that need not be present."""
