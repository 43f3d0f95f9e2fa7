"""What schedulers are handed for a run: objects of KubeRay, a script for Slurm, a cluster file of `ray up`.

`workload` says what is to run and on what, `kuberay`, `slurm` and `ray_up` write it down, and `kuberay_rules` knows
what the operator of KubeRay refuses although its schema does not. Pure functions: nothing here imports Ray, asks a
cluster, or knows a recipe.
"""
