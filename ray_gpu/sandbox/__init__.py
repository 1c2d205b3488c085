"""Confinement of user code, keepers and Ray nodes: bubblewrap, seccomp, Landlock, cgroups.

:mod:`.boundary` launches, :mod:`.harden` is the first thing that runs inside, :mod:`.controls`
names what may be missing. Nothing is imported here, so that a sandbox starts fast.
"""
