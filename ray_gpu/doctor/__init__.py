"""``ray-gpu doctor``: whether this host's controls hold, and how to mend those that do not. Reads; changes nothing.

A check is a pure function of what was read; :mod:`.examination` reads, and knows which role needs which control.
"""
