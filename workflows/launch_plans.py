"""Every schedule. A plan's Python name is its name, since `pyflyte run` finds it by the former and Flyte by the latter."""

from flytekit import CronSchedule, LaunchPlan

from workflows.retrain import retrain_sft

sft_nightly = LaunchPlan.get_or_create(
    workflow=retrain_sft,
    name="sft_nightly",
    schedule=CronSchedule(schedule="0 2 * * *", kickoff_time_input_arg="kickoff_time"),
    fixed_inputs={
        "data_pattern": "s3://postflyte/conversations/%Y-%m-%d/",
        "model": "s3://postflyte/models/llama-3.1-8b-instruct/",
        "eval_data": "s3://postflyte/conversations/held-out/",
    },
    default_inputs={"learning_rate": 1e-5, "steps": 1000, "nodes": 1, "gpus_per_node": 8},
)
"""At 02:00 UTC, on the rows of the day before. What to learn from is fixed; how to learn can be changed in a launch."""
