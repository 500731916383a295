"""The stack around the library: programs, the parts they are made of, and the ground these stand on.

Nothing imports from a room above its own, and rooms side by side are strangers (tests/repository/test_layers.py):

    cli                   the command `jaxmerge`: words in, one program called, an exit code out
    studies               finished runs looked at: one, or many side by side
    improve               the self-improvement loop
    search                solutions looked for step by step
    learn, evaluate       examples in, tuned weights out; what a model can do, and what training changed
    tasks, generate       questions and who is right; prompts in, samples out
    models, data, report  the decoder and its files; examples on disk; a run as a page
    runtime               devices, processes, signals, a run's folder
    resolve.py, log.py    configs to dataclasses and back; what is said to a person

A program is a folder whose `run.py` is the program and whose `settings.py` holds its keys and their defaults.
"""
