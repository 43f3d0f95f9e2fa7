"""`pretrain doctor`: whether this machine, its storage, MLflow and a Ray cluster are fit for a run.

Each check is a function that returns one `Finding`, with what to do where something is amiss; `examine` carries all of
them out. Nothing is changed: a probe that is written to the storage is deleted again. What servers and libraries say is
shown without credentials.
"""
