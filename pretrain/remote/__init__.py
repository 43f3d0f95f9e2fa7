"""Runs in a remote storage (`storage=s3://BUCKET/PREFIX`): a working copy on this machine, and its record in the store.

    $PRETRAIN_CACHE/runs/s3/BUCKET/PREFIX/RUN_ID/    the working copy: a directory of a run like any other
    s3://BUCKET/PREFIX/RUN_ID/                       its record: recipe, event log, scores, samples, logs, report ...
                              step-00000100/         its checkpoints, which workers publish there themselves
                              driver.json            who drives it: a lease that is refreshed every few seconds
    s3://BUCKET/PREFIX/evaluations/                  results by key

Driver, workers and evaluations work in the working copy exactly as in a local run; nothing of them waits for the store
but the publication of a checkpoint. The driver copies what has changed of the record to the store every few seconds,
after each checkpoint and evaluation and at the end; rank 0 does so before it publishes a checkpoint. So whenever a
machine dies, the store holds a run to go on with:

* Its record tells of every step up to its newest checkpoint, and perhaps of later ones, as a local run does after a
  kill. Files that tell how far others have been read arrive after those, and the recipe, which makes it a run, last.
* A file of the record appears whole; one that the store did not take is sent again.
* One working copy writes to a run at a time: who drives it holds the lease, and a second driver is refused while it is
  refreshed. A driver that was silent for `EXPIRY_S` loses it to whoever asks, publishes no more, and ends when it sees
  that. Nobody's clock decides: who asks watches whether the lease is refreshed.

Commands first copy what they need of the record to the working copy, where they then read it. What is in the working
copy stays as it is where this machine was the last to drive the run: it may know more than the store.

Not in the store: requests to stop, heartbeats, the MLflow database (without $MLFLOW_TRACKING_URI each machine has its
own in its working copy), features, schedules and sweeps.

Not here: which files the record of a run has (`pretrain.record.run_dir`), when they are copied
(`pretrain.driver.remote_record`), checkpoints (`pretrain.checkpoints.storage`).
"""
