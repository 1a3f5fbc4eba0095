"""The worker daemon, imported as `alluxiofuse.worker` (see setup.cfg)."""

if __name__ != "alluxiofuse.worker":
    raise ImportError(
        "import alluxiofuse.worker: a second copy of every class would follow from the bare name"
    )
