"""``make attack``: every attack beside its positive control, every control removed once, and a dated report.

A security officer's command, not part of the product. :mod:`.recorder` is loaded by pytest and writes down what each
test did; :mod:`.cases` runs pytest and reads it; :mod:`.mutants` removes controls in copies of the tree;
:mod:`.catalogue` says which text to remove and which test must then fail; :mod:`.report` and :mod:`.screen` show it.
"""
