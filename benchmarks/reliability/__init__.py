"""How the verbs behave when things go wrong, counted: `python -m benchmarks.reliability`.

    __main__     runs the sections and writes docs/reliability.{json,md}
    verbs        runs a verb in a forked process, and says how it ended
    tiny         the run that everything is tried on: its config, text and reference results
    kills        SIGKILL at random moments, in one process and in two
    corruption   damaged files of every kind in a workdir
    sharing      several runs in one workdir; readers beside a writer
    settings     environment variables of JAX's users
    hostile      what hostile input does, in the same columns: configs, foreign (its cases and
                 files), hostile_prompts, infilling

Every section returns rows (see verbs.Row); `silent`, `traceback` and `hang` must be 0.
"""
