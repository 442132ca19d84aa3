"""What a call costs: ``python -m fdistill_ops.bench``, or ``fdistill-bench``."""
