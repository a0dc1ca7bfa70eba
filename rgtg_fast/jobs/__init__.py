"""A file of prompts in, a file of answers out: `rgtg-fast generate`.

`settings` reads what the job is, `rows` its prompts, `rewards` what guides it; an engine (`hf`,
`vllm_offline`, `ray_data`) turns rows into answers, `output` keeps each as it comes, so that the
same command goes on after a kill; `report` draws how rewards, KL and lengths are spread. An engine
is a function `(job, rows) -> iterator of answers`, one line of `run.ENGINES`.
"""


class JobFailed(Exception):
    """A job that had begun cannot go on for now, as where a reward server has gone away."""
