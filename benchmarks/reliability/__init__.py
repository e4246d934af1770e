"""Counts the outcomes of failures in all verbs: `python -m benchmarks.reliability`.

    __main__     runs the sections and writes docs/reliability.{json,md}
    verbs        runs a verb in a forked process and classifies its end
    tiny         the test run: its config, text and reference results
    kills        SIGKILL at random moments, in one process and in two
    corruption   damaged files of every kind in a workdir
    sharing      several runs in one workdir; readers during a writer
    settings     environment variables of JAX's users
    hostile      hostile input, in the same columns: configs, foreign (with its cases and files),
                 hostile_prompts, infilling

Every section returns rows (see verbs.Row); `silent`, `traceback` and `hang` must be 0.
"""
