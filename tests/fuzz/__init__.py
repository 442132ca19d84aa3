"""A fuzzer of the public functions: draws calls, legal ones and wrong ones, and holds the legal ones against the oracle
and the wrong ones against the promise that each is refused by the argument's name, with nothing changed.

    python -m tests.fuzz --calls 1000 --backends cpu,reference      (make fuzz CALLS=1000 BACKENDS="cpu reference")

    specs.py     a call as a record, and the record as source text
    operands.py  unusual tensors and objects
    draw.py      legal calls;  wrong.py  what can be wrong with one;  others.py  calls without samples
    contract.py  which calls are legal, from the documentation
    expected.py  what a legal call must give, from fdistill_ops/_oracle.py
    execute.py   one call from its record to its faults
    process.py   calls in a child process;  shrink.py  the smallest call with the same fault
    script.py    a script that shows it
"""
