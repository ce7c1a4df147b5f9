"""When a loop turns: LaunchPlan objects and nothing else."""
