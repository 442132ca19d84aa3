"""A thin reference trainer for f-distill: ``python -m fdistill_ops.trainer``.

``distill`` is the algorithm, on ``edm`` (noise, sampler) and ``networks``. ``teacher`` and ``training``
come before it; ``evaluate``, ``figures``, ``report`` after it. ``run`` is the order of things, ``config`` the settings;
``compare`` does it for several divergences, data sets and seeds.
"""
