"""The planner: memory, communication and projected time of a run on devices that need not be here (floor 5)."""
